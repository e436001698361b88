"""Method auto: what it takes, when, and that the same request is the same search everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowfast
from flowfast.calibration import auto
from flowfast.calibration.bank import BankPath, write
from flowfast.config import Picked
from flowfast.errors import OptionError
from flowfast.methods.prune import Prune
from tests.calibration.banks import bank_of, path_of, walk
from tests.toys import GaussianFlow, NearTarget

SEEING = [0.05, 0.3, 0.6, 0.8, 0.9, 1.0]
BLIND = [0.0, 0.0, 0.05, 0.1, 0.1, 1.0]
PROMPTS = ["a", "bb", "ccc"]


class Guided(GaussianFlow):
    """With a calibration of its own; a scale of guidance changes what an evaluation costs and nothing else."""

    def __init__(self, calibration: Path | None = None) -> None:
        super().__init__()
        self.defaults = flowfast.FlowDefaults(calibration_file=calibration)


def calibrated(folder: Path, *paths: BankPath, **other: Any) -> Guided:
    file = folder / "calibration.json"
    write(file, bank_of(*(paths or (path_of(walk(8, 24, SEEING)),)), flow=Guided(), **other))
    return Guided(file)


def search(flow: Any, prompts: Any = PROMPTS, **options: Any) -> flowfast.SearchResult:
    return flowfast.search(flow, prompts, **{"reward": NearTarget(), "budget": 40, "micro_batch": 4} | options)


def same(one: flowfast.SearchResult, other: flowfast.SearchResult) -> bool:
    pairs = list(zip(one.samples, other.samples, strict=True))
    return all(torch.equal(a.latent, b.latent) and (a.nfe, a.reward) == (b.nfe, b.reward) for a, b in pairs)


def picked_of(result: flowfast.SearchResult) -> Picked:
    assert result.config.method == "auto" and result.config.picked is not None
    return result.config.picked


def concrete(picked: Picked) -> dict[str, Any]:
    """As a caller would write it."""
    return {"method": picked.method, "method_options": picked.method_options, **picked.path}


# ---- what is taken ----


def test_it_is_the_default_and_takes_what_the_calibration_shows(tmp_path: Path) -> None:
    flow = calibrated(tmp_path)
    found = search(flow)
    picked = picked_of(found)
    assert picked.method == "prune" and picked.path["grid"].startswith("linear-times:") and picked.calibration
    assert picked.expected is not None and 0.5 < picked.expected < 3
    assert found.samples[0].method == "prune" and found.samples[0].nfe <= 40
    assert same(found, search(flow, method="auto"))
    assert same(found, search(GaussianFlow(), **concrete(picked)))


def test_without_a_calibration_it_is_prunes_default(tmp_path: Path) -> None:
    found = search(GaussianFlow(), steps=6)
    picked = picked_of(found)
    assert (picked.method, picked.path, picked.calibration) == ("prune", {}, None)
    assert picked.why == "prune's default, for there is no calibration of this model"
    assert same(found, search(GaussianFlow(), method="prune", steps=6))


def test_below_three_scouts_it_is_best_of_n() -> None:
    found = search(GaussianFlow(), steps=6, budget=8)
    assert picked_of(found).method == "bon" and "too few scouts" in picked_of(found).why
    assert same(found, search(GaussianFlow(), method="bon", steps=6, budget=8))


def test_a_blind_reward_gets_best_of_n_and_is_told_so(tmp_path: Path) -> None:
    found = search(calibrated(tmp_path, path_of(walk(24, 24, BLIND))))
    assert picked_of(found).method == "bon" and "blind" in picked_of(found).why


def test_of_two_paths_the_better_one_is_walked(tmp_path: Path) -> None:
    rewards = walk(8, 24, SEEING)
    own, short = path_of(rewards), path_of(rewards[:, :, [1, 3, 5]] + 1)
    found = search(calibrated(tmp_path, own, short))
    assert picked_of(found).path["grid"] == short.options["grid"]
    assert len(found.config.grid.split(",")) == 3 if isinstance(found.config.grid, str) else False


def test_what_the_caller_says_of_the_path_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewards = walk(8, 24, SEEING)
    own, short = path_of(rewards), path_of(rewards[:, :, [1, 3, 5]] + 1)
    flow = calibrated(tmp_path, own, short)

    def held() -> bool:
        found = search(flow, grid=own.options["grid"])
        return found.config.grid == own.options["grid"] and picked_of(found).calibration is not None

    assert held()
    other = search(flow, steps=5)  # on which there is nothing
    assert other.config.steps == 5 and picked_of(other).calibration is None
    assert "has not the path" in picked_of(other).why
    guided = search(flow, guidance=2.0)  # of which the bank's paths are not
    assert guided.config.guidance == 2.0 and picked_of(guided).calibration is None
    monkeypatch.setattr(auto, "unsaid", lambda _: set(auto.WALK_OPTIONS))
    assert not held()


def test_it_follows_from_the_budget_alone(tmp_path: Path) -> None:
    flow = calibrated(tmp_path)
    one, other = search(flow, ["a"], seed=3), search(flow, ["bb", "ccc"], micro_batch=2)
    assert picked_of(one) == picked_of(other)
    assert picked_of(search(flow, budget=90)) != picked_of(one)


def test_seconds_become_nfe_before_it_chooses(tmp_path: Path) -> None:
    found = search(calibrated(tmp_path), budget=None, seconds=0.2)
    picked = picked_of(found)
    assert picked.calibration and picked.path["grid"].startswith("linear-times:")
    assert {sample.budget_nfe for sample in found.samples} == {picked.budget}
    again = search(Guided(), budget=picked.budget, **concrete(picked))
    assert same(found, again) or found.config.cuts


# ---- what is refused ----


def test_its_options_are_its_own() -> None:
    with pytest.raises(OptionError, match="method 'auto' has no option 'n': leave it out, or name another method"):
        search(GaussianFlow(), method_options={"n": 3})


class Other(NearTarget):
    def __init__(self, name: str = "near-target", weights: int = 1) -> None:
        super().__init__()
        self.name = name
        self.bias = torch.nn.Parameter(torch.zeros(weights))


@pytest.mark.parametrize(
    ("flow", "reward", "says"),
    [
        (Guided(), Other("far"), "of reward 'near-target', not of this reward 'far'"),
        (Guided(), Other(), "of another state of reward 'near-target'"),
        (GaussianFlow(), NearTarget(), "of another state of model 'toy'"),
    ],
)
def test_a_calibration_of_others_is_refused_where_it_was_given(
    flow: Any, reward: Any, says: str, tmp_path: Path
) -> None:
    file = calibrated(tmp_path).defaults.calibration_file
    with pytest.raises(OptionError, match=f"the calibration .* is {says}: make one with `flowfast calibrate`"):
        search(flow, reward=reward, calibration=str(file))
    own = Guided(Path(str(file)))
    if not isinstance(reward, Other):
        return
    assert says in picked_of(search(own, reward=reward)).why  # the model's own is passed over


def test_a_calibration_of_another_path_is_refused_where_it_was_given(tmp_path: Path) -> None:
    file = str(calibrated(tmp_path).defaults.calibration_file)
    with pytest.raises(OptionError, match="has not the path that was asked for"):
        search(Guided(), calibration=file, steps=4)
    assert picked_of(search(Guided(), calibration=file)).calibration is not None


@pytest.mark.parametrize("text", ["", "{}", '{"name": "flowfast-calibration", "format": 9}', "[NaN]"])
def test_a_damaged_calibration_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(OptionError, match="cannot read the calibration .*c.json: .*make it anew"):
        search(Guided(), calibration=str(tmp_path / "c.json"))


# ---- the same search everywhere ----


def test_a_rerun_takes_the_same_without_the_calibration(tmp_path: Path) -> None:
    flow = calibrated(tmp_path)
    found = search(flow)
    Path(str(flow.defaults.calibration_file)).unlink()
    again = search(Guided(), config=found.config)
    assert same(found, again) and again.config == found.config
    changed = search(Guided(), config=found.config, budget=41)  # another request: chosen anew
    assert picked_of(changed).calibration is None


def test_its_samples_replay(tmp_path: Path) -> None:
    found = search(calibrated(tmp_path))
    replayed = flowfast.replay(Guided(), found.samples[1], found.config)
    assert torch.equal(replayed[-1][1], found.samples[1].image)
    assert len(replayed) == len(SEEING)


def test_a_search_that_was_killed_goes_on_though_the_calibration_changed(tmp_path: Path) -> None:
    flow = calibrated(tmp_path)
    expected, file, rounds = search(flow), tmp_path / "search.safetensors", []

    def stop(_: Any) -> None:
        rounds.append(1)
        if len(rounds) == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(flow, checkpoint=file, checkpoint_seconds=0, on_round=stop)
    changed = calibrated(tmp_path, path_of(walk(24, 24, BLIND)))
    assert picked_of(search(changed)).method == "bon"
    assert same(search(changed, checkpoint=file), expected)


def test_the_engine_takes_the_same_and_what_is_alike_shares_a_batch(tmp_path: Path) -> None:
    flow = calibrated(tmp_path)
    engine = flowfast.Engine(flow, NearTarget(), slots=4, micro_batch=4, max_budget=60)
    ids = [engine.add_request(prompt, budget=40) for prompt in PROMPTS]
    done = {event.id: event for event in engine.stream() if isinstance(event, flowfast.Finished)}
    alone = search(flow)
    for id, sample in zip(ids, alone.samples, strict=True):
        assert torch.equal(done[id].sample.latent, sample.latent)
        assert done[id].rerun.picked == picked_of(alone)
    assert engine.core.rows_seen <= sum(sample.nfe for sample in alone.samples) + 4 * 6


def test_an_archive_is_what_it_takes_at_its_largest_budget(tmp_path: Path) -> None:
    flow = GaussianFlow()
    manifest = flowfast.export(flow, tmp_path / "a.pt", reward=NearTarget(), budget=40, steps=6, micro_batch=4)
    assert manifest["method"] == "prune"
    runner = flowfast.load_archive(tmp_path / "a.pt")
    assert runner is not None


def test_options_of_prune_are_those_of_the_plan() -> None:
    assert auto.options_of(Prune()) == {"at": [0.7, 0.55], "keep": [0.4, 0.15]}
    assert np.isclose(walk(2, 500, SEEING)[..., 3].std(), 1, atol=0.1)
