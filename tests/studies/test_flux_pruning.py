"""The replay of pruning on rewards of images that were drawn before: order statistics, chains whose outcome is known,
equal cost, and what the choice of cuts may not see."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from bench.studies.flux_pruning import __main__ as command
from bench.studies.flux_pruning import halving, study
from bench.studies.flux_pruning.bank import REWARDS, Bank, flux_times, read
from bench.studies.flux_pruning.halving import Cuts, Floats, alive, best, cost, draw, keys_of, most, winners
from bench.studies.flux_pruning.report import tables
from flowfast.errors import OptionError
from flowfast.flow.schedule import ScheduleSpec, build_schedule
from flowfast.methods.prune import Prune

ROOT = Path(__file__).resolve().parents[2]
CUTS: Cuts = ((1, 0.5), (3, 0.2))
FLUX_CUTS: Cuts = ((9, 0.4), (13, 0.15))


def noise(*shape: int, seed: int = 0) -> Floats:
    return np.random.default_rng(seed).uniform(size=shape)


def seen_from(step: int, prompts: int = 40, images: int = 60, steps: int = 5) -> Floats:
    """Rewards that say nothing before a step, and from it on exactly what the last one says."""
    rewards = noise(prompts, images, steps, seed=step)
    rewards[..., step:] = rewards[..., -1:]
    return rewards


def values(rewards: Floats, cuts: Cuts, n: int, draws: int = 50) -> Floats:
    """(P, D): the final reward of what comes out of each draw."""
    P, N, _ = rewards.shape
    image = winners(keys_of(rewards), draw(P, N, draws, seed=1), cuts, n)
    return rewards[..., -1].ravel()[image].reshape(P, draws)


def assert_mean(found: Floats, expected: Floats | float) -> None:
    """Of (P, D) draws: |z| < 4.9 over prompts, which are independent."""
    off = found.mean(1) - expected
    assert abs(off.mean()) < 4.9 * off.std(ddof=1) / len(off) ** 0.5


@pytest.mark.parametrize("n", [1, 5, 20])
def test_best_of_n_is_the_maximum_of_n_uniforms(n: int) -> None:
    rewards = noise(400, 100, 3)
    assert_mean(values(rewards, (), n), n / (n + 1))
    assert halving.expected_best(rewards[..., -1], n).mean() == pytest.approx(n / (n + 1), abs=0.01)
    assert_mean(values(rewards, (), n), halving.expected_best(rewards[..., -1], n))


def test_a_first_cut_that_knows_all_gives_the_best_of_all() -> None:
    rewards = np.random.default_rng(0).integers(0, 3, (40, 60, 1)) * np.array([1.0, 2.0, 4.0])  # a chain of 3 states
    cuts: Cuts = ((0, 0.4), (1, 0.1))
    assert (values(rewards, cuts, 7) == values(rewards, (), 7)).all()


def test_a_blind_verifier_leaves_a_random_choice() -> None:
    rewards = noise(400, 60, 3)
    cuts: Cuts = ((0, 0.5), (1, 0.2))
    found = values(rewards, cuts, 15)
    assert_mean(found, halving.expected_best(rewards[..., -1], alive(cuts, 15)[-1]))
    fair = most((), cost(cuts, 15, 3, 0.12), 60, 3, 0.12)
    assert found.mean() < values(rewards, (), fair).mean() - 0.05


def by_hand(rewards: Floats, order: list[int], cuts: Cuts, n: int) -> int:
    """One prompt, one draw."""
    live = order[:n]
    for (cut, _), count in zip(cuts, alive(cuts, n)[1:], strict=True):
        live = sorted(live, key=lambda image: -rewards[image, cut])[:count]
    return max(live, key=lambda image: rewards[image, -1])


def check_by_hand() -> None:
    rewards, orders = noise(3, 30, 5), draw(3, 30, 20, seed=2)
    for n in (1, 2, 3, 10, 30):
        found = winners(keys_of(rewards), orders, CUTS, n).reshape(3, 20)
        wanted = [
            [30 * p + by_hand(rewards[p], (orders[20 * p + d] - 30 * p).tolist(), CUTS, n) for d in range(20)]
            for p in range(3)
        ]
        assert found.tolist() == wanted


def test_every_draw_is_what_a_plain_loop_gives() -> None:
    check_by_hand()


@pytest.mark.parametrize("mutant", ["the worst", "one too many"])
def test_who_goes_on_shows(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def other(keys: Any, live: Any, count: int) -> Any:
        if mutant == "the worst" and count > 1:
            return best(keys, live, live.shape[1])[:, -count:]
        return best(keys, live, count + (count > 1))

    monkeypatch.setattr(halving, "best", other)
    with pytest.raises(AssertionError):
        check_by_hand()


def check_cost(verification: float = 0.12) -> None:
    """The images of each step are those of the method's own plan, and all that the budget pays."""
    times = flux_times(20)
    grid = "linear-times:" + ",".join(map(str, times))
    schedule = build_schedule(ScheduleSpec(diffusion="zero", grid=grid, t_finish=times[-1]))
    for n in range(1, 60):
        plan = Prune(n=n).plan(schedule, 20 * n, None, None)
        counts = [sum(quota[at] for quota in plan.quota) for at in range(20)]
        scored = sum(count for count, cut in zip(counts, plan.regroup, strict=True) if cut) + counts[-1]
        assert halving.cost(FLUX_CUTS, n, 20, verification) == pytest.approx(sum(counts) + scored * verification)
    for budget in np.arange(20.2, 500, 3.7):
        n = halving.most(FLUX_CUTS, budget, 100, 20, verification)
        assert halving.cost(FLUX_CUTS, n, 20, verification) <= budget < halving.cost(FLUX_CUTS, n + 1, 20, verification)


def test_costs_are_those_of_the_method() -> None:
    assert tuple(Prune().cuts(flux_times(20))) == FLUX_CUTS
    check_cost()
    check_cost(verification=0.0)
    assert most((), 201.2, 100, 20, 0.12) == 10
    assert most(FLUX_CUTS, 1e6, 100, 20, 0.12) == 100


@pytest.mark.parametrize(
    "mutant",
    [
        lambda cuts, n, steps, verification: cost(cuts, n, steps, 0.0),
        lambda cuts, n, steps, verification: n * (steps + verification),
        lambda cuts, n, steps, verification: cost(tuple((c - 1, s) for c, s in cuts), n, steps, verification),
    ],
    ids=["verifications are free", "cuts save nothing", "a step less before a cut"],
)
def test_costs_that_are_not_counted_show(mutant: Callable[..., float], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(halving, "cost", mutant)
    with pytest.raises(AssertionError):
        check_cost()


def test_the_chosen_cuts_are_where_the_verifier_begins_to_see() -> None:
    rewards = seen_from(2, steps=6)
    orders = draw(40, 60, 20, seed=3)
    cuts = halving.calibrated(keys_of(rewards), rewards[..., -1].ravel(), orders, 6 * 6.0, 0.01)
    assert cuts[0][0] == 2
    assert alive(cuts, most(cuts, 36.0, 60, 6, 0.01))[0] > 6


def test_no_two_cuts_are_better_than_the_chosen_ones() -> None:
    rewards, orders = seen_from(1, prompts=6, images=20, steps=4), draw(6, 20, 5, seed=3)
    rewards[..., :-1] += 0.3 * noise(6, 20, 3, seed=9)
    keys, final = keys_of(rewards), rewards[..., -1].ravel()

    def value(cuts: Cuts) -> float:
        return float(final[winners(keys, orders, cuts, most(cuts, 24.0, 20, 4, 0.5))].mean())

    chosen = halving.calibrated(keys, final, orders, 24.0, 0.5)
    assert value(chosen) == max(map(value, halving.pairs_of_cuts(4)))


def test_rank_correlations_are_spearmans() -> None:
    rewards = noise(5, 30, 4)
    expected = [np.mean([spearmanr(of[:, k], of[:, -1]).statistic for of in rewards]) for k in range(4)]
    assert halving.correlations(rewards) == pytest.approx(np.array(expected))


def test_times_are_those_of_diffusers_sampler() -> None:
    diffusers = pytest.importorskip("diffusers")
    sampler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    mu = 0.5 + (1.15 - 0.5) * (1024 - 256) / (4096 - 256)  # 1,024 tokens, as FluxPipeline has it
    sampler.set_timesteps(sigmas=np.linspace(1.0, 1 / 20, 20), mu=mu)
    assert flux_times(20) == pytest.approx(sampler.sigmas[:-1].tolist(), abs=1e-6)


SMALL = study.Settings(draws=20, tuning_draws=4)


@pytest.fixture
def bank() -> Bank:
    """Three rewards that agree in part and see the more the later."""
    truth, late = noise(8, 24, 1), np.linspace(1.0, 0.0, 5)
    return Bank({name: truth + 0.2 * noise(8, 24, 1, seed=k) + late * noise(8, 24, 5, seed=9 + k)
                 for k, name in enumerate(REWARDS.values())})  # fmt: skip


def test_rows_compare_at_equal_cost_and_hold_two_rewards_out(bank: Bank) -> None:
    rows = list(study.study(bank, flux_times(5), SMALL))
    assert [(row["selects"], row["n"]) for row in rows[::3]] == [(r, n) for r in bank.rewards for n in study.SAMPLES]
    for base, *others in zip(rows[::3], rows[1::3], rows[2::3], strict=True):
        assert base["arm"] == study.BASELINE and base["images"] == [base["n"]] and base["cost"] == base["budget"]
        assert all(value == {"mean": 0, "low": 0, "high": 0} for value in base["difference"].values())
        for row in others:
            assert row["cost"] <= base["budget"] == row["budget"]
            for by, value in row["value"].items():
                assert row["difference"][by]["mean"] == pytest.approx(value["mean"] - base["value"][by]["mean"])
        for row in (base, *others):
            held_out = [value["mean"] for by, value in row["value"].items() if by not in (row["selects"], "held out")]
            assert len(held_out) == 2 and row["value"]["held out"]["mean"] == pytest.approx(np.mean(held_out))
            assert row["value"][row["selects"]]["mean"] > row["value"]["held out"]["mean"]


@pytest.mark.parametrize(("half", "seen"), [(1, False), (0, True)], ids=["reported", "tuning"])
def test_cuts_are_chosen_on_the_tuning_half_alone(bank: Bank, half: int, seen: bool) -> None:
    other = {name: of.copy() for name, of in bank.rewards.items()}
    for k, of in enumerate(other.values()):
        of[half::2] = noise(4, 24, 5, seed=50 + k)
    chosen = [
        [(row["times"], row["shares"]) for row in study.study(each, flux_times(5), SMALL)]
        for each in (bank, Bank(other))
    ]
    assert (chosen[0] != chosen[1]) == seen


def write_npz(path: Path, bank: Bank, **others: Any) -> Path:
    arrays = dict(zip(REWARDS, bank.rewards.values(), strict=True)) | others
    np.savez(path, **{name: np.float32(of) for name, of in arrays.items() if of is not None})
    return path


def test_the_folder_of_text_files_and_the_arrays_are_one_bank(bank: Bank, tmp_path: Path) -> None:
    arrays = read(write_npz(tmp_path / "bank.npz", bank))
    for key, name in REWARDS.items():
        folder = tmp_path / f"flux_{key}_val_base"
        folder.mkdir()
        for step in range(5):
            lists = [
                f"{prompt}:\n" + "".join(f"- {float(value)!r}\n" for value in arrays.rewards[name][prompt, :, step])
                for prompt in range(8)
            ]
            (folder / f"p8_i24_s{step:02d}.yaml").write_text("".join(lists))
    texts = read(tmp_path)
    assert all((texts.rewards[name] == of).all() for name, of in arrays.rewards.items())


@pytest.mark.parametrize(
    ("others", "message"),
    [
        ({"hps": None}, "hps is missing"),
        ({"pic": np.full((8, 24, 5), np.nan)}, "pic: expected finite rewards"),
        ({"imr": np.ones((8, 24, 5))}, "imr: all finished images of prompt 0 have one reward"),
        ({"imr": np.ones((8, 24, 4))}, "arrays of one shape"),
        ({name: noise(8, 19, 5) for name in REWARDS}, r"at least \(4, 20, 3\)"),
    ],
)
def test_what_cannot_be_replayed_is_said(bank: Bank, tmp_path: Path, others: dict[str, Any], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        read(write_npz(tmp_path / "bank.npz", bank, **others))


def test_a_source_that_is_none_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "text.npz").write_text("no archive")
    (tmp_path / "flux_imr_val_base").mkdir()
    (tmp_path / "flux_imr_val_base" / "p1_i1_s00.yaml").write_text("- 1\n")
    for source, message in [("none.npz", "No such file"), ("text.npz", "expected an .npz"), (".", "a line '- 1'")]:
        assert command.main([str(tmp_path / source), "--out", str(tmp_path / "out")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("flux_pruning: ") and message in line
    assert command.main([str(tmp_path), "--verification", "-1"]) == 2
    assert "option 'verification': must be in 0 .. 1,000, got '-1'" in capsys.readouterr().err


def test_the_command_writes_what_it_prints(bank: Bank, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_npz(tmp_path / "bank.npz", bank)
    arguments = [str(source), "--draws", "20", "--tuning-draws", "4", "--verification", "0.3"]
    texts = []
    for out in (tmp_path / "once", tmp_path / "again"):
        assert command.main([*arguments, "--out", str(out)]) == 0
        assert (out / "flux_pruning.png").read_bytes().startswith(b"\x89PNG")
        texts.append((out / "flux_pruning.json").read_text())
    assert texts[0] == texts[1]
    results = json.loads(texts[0])
    assert results["settings"] == {"verification": 0.3, "draws": 20, "tuning_draws": 4, "seed": 0}
    printed = capsys.readouterr().out
    assert tables(results) in printed and "0.3 of a step a verification" in printed


def test_the_document_has_the_figures_of_the_results() -> None:
    results = json.loads((ROOT / "bench/results/flux_pruning/flux_pruning.json").read_text())
    assert tables(results) in (ROOT / "docs/results.md").read_text(encoding="utf-8")
