"""The study of search on scenes: what runs first, what equal cost means, a run that is killed, and what it counts."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bench.studies.search_evidence import __main__ as command
from bench.studies.search_evidence import design, planner, run, shown, summary
from bench.studies.search_evidence.design import ARMS, Arm, Job, Study, chosen_arms
from bench.studies.search_evidence.order import order
from bench.studies.search_evidence.planner import Costs, Planner
from bench.studies.search_evidence.summary import Case
from flowfast import api
from flowfast.errors import FlowfastError, OptionError, OutputError

PROMPTS = ("two red circles", "one green cross and one blue square", "one yellow triangle")
COSTS = Costs(model_ms=5.0, reward_ms=0.9, decode_ms=0.1, processor="one")
DEAR = Costs(model_ms=5.0, reward_ms=5.0, decode_ms=1.0, processor="one")
SMALL = Study(prompts=PROMPTS, budgets=(60,), seeds=2, slots=2, micro_batch=4)
TWO = chosen_arms("bon/base,prune/base")
HERE = [arm for arm in ARMS if Planner(api.load("scenes"), Study(), COSTS).why_not(arm) is None]


def encode(prompts: list[str]) -> dict[str, Tensor]:
    return {"length": torch.tensor([float(len(text)) for text in prompts])}


def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return (x_t - (cond["length"] / 40.0).view(-1, 1, 1, 1)) * 0.5


@pytest.fixture(autouse=True)
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow that costs nothing in the place of the scenes model, with its path."""
    defaults = api.load("scenes").defaults

    def load(name: str) -> Any:
        flow = api.flow_from(velocity, (3, 32, 32), lambda x: x.mul(0.1).add(0.5).clamp(0, 1), encode, guidance=3.0)
        type(flow).defaults = property(lambda self: defaults)  # type: ignore[assignment, method-assign]
        return flow

    before = api.FunctionFlow.__dict__["defaults"]
    monkeypatch.setattr(api, "load", load)
    yield
    api.FunctionFlow.defaults = before  # type: ignore[method-assign]


def planner_of(study: Study, costs: Costs = COSTS) -> Planner:
    return Planner(api.load("scenes"), study, costs)


# ---- what is compared, and in which order ----


def test_every_arm_of_the_issue_is_there() -> None:
    walkers = ("ode", "bon", "prune", "auto", "bon+pool", "prune+pool")
    own = {f"{method}/{path}" for method in walkers for path in ("base", "fast")}
    noisy = ("smc", "code", "svdd", "sop", "rbf-margin0", "rbf-margin1")
    assert {str(arm) for arm in ARMS} == own | {f"{method}/{path}" for method in noisy for path in ("linear", "vp")}
    assert {str(arm.baseline) for arm in ARMS if arm.path == "fast"} == {"bon/fast"}
    assert {str(arm.baseline) for arm in ARMS if arm.path != "fast"} == {"bon/base"}


def test_the_paths_are_what_they_are_called() -> None:
    plan = planner_of(Study())
    for path in ("base", "linear", "vp"):
        facts = plan.facts(Arm("bon" if path == "base" else "rbf-margin0", path), 500)
        assert facts["options"] == {} and facts["nfe"] == 500
    assert len(plan.facts(Arm("bon", "base"), 500)["times"]) == 10
    assert plan.facts(Arm("rbf-margin1", "vp"), 500)["options"] == {"margin": 1.0}


def test_claims_run_first_seed_by_seed_and_each_before_its_twin_at_equal_cost() -> None:
    """A reward as dear as an evaluation: prune then has twins at every budget."""
    plan = planner_of(Study(), DEAR)
    arms = [arm for arm in HERE if arm.path in ("base", "vp") and arm.method not in ("smc", "code")]
    jobs = list(order(plan, arms))
    assert len(jobs) == len(set(jobs))
    plain = [job for job in jobs if job.arm.method == "ode"]
    assert jobs[: len(plain)] == plain
    assert plain == [Job(arm, 50, seed) for seed in range(3) for arm in arms if arm.method == "ode"]
    jobs = jobs[len(plain) :]
    bon, prune = TWO
    turn = []
    for budget in (50, 100, 200):
        twin = plan.at_cost(prune, budget)
        assert twin is not None and twin < budget
        turn += [(bon, budget), (prune, budget), (prune, twin)]
    assert [(job.arm, job.budget) for job in jobs[:27]] == turn * 3
    assert [job.seed for job in jobs[:27]] == [0] * 9 + [1] * 9 + [2] * 9
    place = {job: at for at, job in enumerate(jobs)}
    others = [arm for arm in arms if arm.method in ("svdd", "sop")]
    last_claim = max(place[Job(Arm("rbf-margin0", "vp"), 500, seed)] for seed in range(3))
    equal_nfe = [place[Job(arm, budget, 2)] for arm in others for budget in (100, 200, 500)]
    assert last_claim < min(equal_nfe)
    for arm in others:
        twin = plan.at_cost(arm, 200)
        assert twin is not None and (twin == 200 or place[Job(arm, twin, 0)] > max(equal_nfe))


def test_the_tuning_half_has_the_budget_at_which_an_arm_is_chosen_and_no_twins() -> None:
    study = Study(split="tuning")
    assert {job.budget for job in order(planner_of(study), HERE)} == {500}
    assert not set(study.prompts) & set(Study().prompts)


def test_an_arm_that_is_not_there_yet_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(design.METHODS, "auto", {"method": "nobody"})
    plan = planner_of(Study())
    assert "unknown method" in str(plan.why_not(Arm("auto", "base")))
    assert {job.arm.method for job in order(plan, chosen_arms("auto,bon"))} == {"bon"}
    with pytest.raises(OptionError, match="no arm 'bom'"):
        chosen_arms("bon/base,bom")


# ---- equal cost ----


@pytest.mark.parametrize("arm", HERE, ids=str)
def test_what_is_planned_is_what_is_done(arm: Arm) -> None:
    for budget in (64, 117):
        plan = planner_of(Study(prompts=PROMPTS, slots=3, micro_batch=8))
        work, config = plan.work(arm, budget), plan.study.config(arm, budget)
        samples = api.search(plan.flow, list(PROMPTS), config=config).samples
        if config.pool:  # each gets whole waves, all together no more than their budgets
            wave = plan.facts(arm, budget)["wave"]
            for sample in samples:
                assert sample.nfe == sample.waves * wave
                assert sample.reward_calls == pytest.approx(sample.waves * work.rewards * wave / budget)
            assert 0 <= budget * len(samples) - sum(sample.nfe for sample in samples) < wave
            continue
        assert {(sample.nfe, sample.reward_calls) for sample in samples} == {(work.nfe, work.rewards)}


@pytest.mark.parametrize("costs", [COSTS, DEAR], ids=str)
@pytest.mark.parametrize("arm", HERE, ids=str)
def test_an_equal_cost_budget_never_costs_more_than_best_of_n_and_the_next_plan_does(arm: Arm, costs: Costs) -> None:
    plan = planner_of(Study(), costs)
    for budget in (50, 100):
        most, nfe = plan.cost(arm.baseline, budget), plan.at_cost(arm, budget)
        if nfe is None:
            assert plan.cost(arm, least(plan, arm)) > most
            continue
        assert plan.cost(arm, nfe) <= most
        for more in range(nfe + 1, math.floor(most / costs.model_ms) + 1):
            assert plan.cost(arm, more) > most or plan.plan(arm, more)[1] == plan.plan(arm, nfe)[1]


def least(plan: Planner, arm: Arm) -> int:
    return next(nfe for nfe in range(1, 500) if plan.runs(arm, nfe))


def test_a_budget_of_equal_nfe_that_forgets_the_rewards_costs_more() -> None:
    """The mutant: the same NFE. Where rewards are dear that is not equal cost."""
    plan = planner_of(Study(), DEAR)
    assert plan.cost(Arm("prune", "base"), 200) > plan.cost(Arm("bon", "base"), 200)
    assert plan.at_cost(Arm("bon", "base"), 200) == 200


def test_costs_are_measured_at_the_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()
    plan = planner_of(SMALL)
    real = plan.flow.velocity
    monkeypatch.setattr(plan.flow, "velocity", lambda x, t, cond: seen.add(len(x)) or real(x, t, cond))
    costs = planner.measured(plan.flow, SMALL, repeats=3)
    assert seen == {4} and min(costs.model_ms, costs.reward_ms, costs.decode_ms) > 0


# ---- running ----


def rows_in(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / run.ROWS).read_text().splitlines()]


def results_of(folder: Path) -> Any:
    apart = {"seconds", "cpu_seconds", "commit"}
    rows = [{name: value for name, value in row.items() if name not in apart} for row in rows_in(folder)]
    return sorted(rows, key=lambda row: (row["method"], row["budget"], row["seed"]))


@pytest.fixture
def constants(tmp_path: Path) -> Any:
    """constant(name) makes a folder whose constants are COSTS, so that no clock decides what runs."""

    def make(name: str) -> Path:
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "constants.json").write_text(json.dumps(asdict(COSTS)))
        return tmp_path / name

    return make


def test_a_run_that_is_killed_goes_on_to_the_same_rows(constants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, parts = constants("whole"), constants("parts")
    run.run(SMALL, TWO, whole, 1)
    jobs = [Job(Arm(row["method"], row["path"]), row["budget"], row["seed"]) for row in rows_in(whole)]
    assert jobs == list(order(planner_of(SMALL), TWO)) and len(jobs) >= 4
    real, calls = api.search, 0

    def stops(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(api, "search", stops)
    with pytest.raises(KeyboardInterrupt):
        run.run(SMALL, TWO, parts, 1)
    assert len(rows_in(parts)) == 2
    with (parts / run.ROWS).open("a") as file:
        file.write('{"method": "bo')  # killed inside a write
    told: list[tuple[int, int]] = []
    run.run(SMALL, TWO, parts, 1, lambda done, of, row: told.append((done, of)))
    assert results_of(parts) == results_of(whole)
    assert told == [(done, len(jobs)) for done in range(3, len(jobs) + 1)]
    assert calls == 1 + len(jobs)
    more = Study(prompts=PROMPTS, budgets=(60, 84), seeds=2, slots=2, micro_batch=4)
    run.run(more, TWO, parts, 1)  # more budgets: only those are run
    assert calls == 1 + len(list(order(planner_of(more), TWO)))


def test_a_row_has_what_each_prompt_cost(constants: Any) -> None:
    folder = constants("o")
    run.run(SMALL, TWO, folder, 1)
    for row in rows_in(folder):
        assert all(len(row[name]) == len(PROMPTS) for name in run.PER_PROMPT)
        for nfe, unspent, evaluations in zip(row["nfe"], row["unspent"], row["evaluations"], strict=True):
            assert nfe + unspent == row["budget"] and nfe == 2 * evaluations
        assert row["nfe"][0] == row["search"]["nfe"] and row["reward_calls"][0] == row["search"]["rewards"]
        assert {0.0, 1.0} >= set(row["heldout"]) and row["rows_padded"] >= 0
        assert row["seconds"]["total"] > 0 and row["versions"]["torch"] and row["commit"]
    pictures = sorted(str(path.relative_to(folder / "pictures")) for path in folder.glob("pictures/*/*.png"))
    assert pictures[:4] == ["bon-base-60/00.png", "bon-base-60/01.png", "bon-base-60/02.png", "prune-base-60/00.png"]


def test_rows_of_another_search_of_the_same_name_are_run_again(constants: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = constants("o")
    run.run(SMALL, TWO[:1], folder, 1)
    monkeypatch.setitem(design.PATHS, "base", {**design.PATHS["base"], "steps": 5})
    run.run(SMALL, TWO[:1], folder, 1)
    rows = rows_in(folder)
    assert [row["search"]["path"]["steps"] for row in rows] == [10, 10, 5, 5]
    assert len(run.valid_rows(run.open_study(SMALL, folder), folder)) == 2


def test_another_study_and_damaged_files_are_refused(constants: Any) -> None:
    folder = constants("o")
    run.run(SMALL, TWO[:1], folder, 1)
    with pytest.raises(OutputError, match="other prompts"):
        run.run(Study(prompts=PROMPTS[:2], budgets=(60,), slots=2, micro_batch=4), TWO, folder, 1)
    lines = (folder / run.ROWS).read_text()
    for damage in ('{"method": "bon"}', "[1]", lines.splitlines()[0].replace('"nfe": [', '"nfe": [1, ', 1)):
        (folder / run.ROWS).write_text(lines + damage + "\n")
        with pytest.raises(OutputError, match="line 3, is damaged"):
            run.run(SMALL, TWO[:1], folder, 1)
    (folder / run.ROWS).write_text(lines)
    (folder / "constants.json").write_text('{"model_ms": 1}')
    with pytest.raises(OutputError, match="constants.json"):
        run.run(SMALL, TWO[:1], folder, 1)


# ---- what rows say ----


def row_of(plan: Planner, arm: str, budget: int, seed: int, heldout: list[float], reward: float = 0.0) -> run.Row:
    job = Job(*chosen_arms(arm), budget, seed)
    work, count = plan.work(job.arm, budget), len(heldout)
    each = {"nfe": work.nfe, "reward_calls": work.rewards, "decodes": work.decodes, "unspent": budget - work.nfe}
    return {
        **{"method": job.arm.method, "path": job.arm.path, "budget": budget, "seed": seed},
        **{name: [value] * count for name, value in each.items()},
        **{"heldout": heldout, "reward": [reward] * count, "evaluations": [1] * count, "rows_padded": count},
        **{"seconds": {"total": 3.0}, "cpu_seconds": 2.0, "commit": "abc", "versions": {"torch": "2"}},
        "search": plan.facts(job.arm, budget),
    }


def many(count: int, seeds: int = 2, **facts: Any) -> Planner:
    return planner_of(Study(prompts=tuple(f"prompt {each}" for each in range(count)), seeds=seeds, **facts))


def test_a_difference_is_paired_by_prompt_and_seed_and_drawn_by_prompt() -> None:
    """Against a table by hand: differences .5, .5, 0, 0 of the prompts' means, once for each prompt of 25 alike."""
    plan = many(100)
    alike = np.arange(100) % 4
    base = [np.isin(alike, kinds).astype(float) for kinds in ((1, 3), (0, 3))]
    mine = [np.isin(alike, kinds).astype(float) for kinds in ((0, 1, 3), (0, 1, 3))]
    rows = [row_of(plan, "bon/base", 100, seed, base[seed].tolist()) for seed in range(2)]
    rows += [row_of(plan, "prune/base", 100, seed, mine[seed].tolist()) for seed in range(2)]
    rows += [row_of(plan, "bon/base", 100, 2, [1.0] * 100)]  # of a seed that is not asked for
    found = summary.Results(plan, rows)
    difference = found.minus(Case(Arm("prune", "base"), 100), Case(Arm("bon", "base"), 100))
    by_hand = np.where(alike < 2, 0.5, 0.0)
    picks = np.random.default_rng(5).integers(0, 100, (20_000, 100))
    low, high = np.quantile(by_hand[picks].mean(1), [0.025, 0.975])
    assert difference == {"mean": 0.25, "low": pytest.approx(low, abs=0.006), "high": pytest.approx(high, abs=0.006)}
    mutant = found.mean(Case(Arm("prune", "base"), 100), "heldout")  # unpaired: two intervals beside each other
    other = found.mean(Case(Arm("bon", "base"), 100), "heldout")
    assert mutant and other and mutant["high"] - other["low"] > high + 0.05


def test_a_difference_takes_the_seeds_that_both_have() -> None:
    plan = many(4, seeds=3)
    rows = [row_of(plan, "bon/base", 100, seed, [float(seed == 2)] * 4) for seed in range(3)]
    rows += [row_of(plan, "prune/base", 100, 0, [1.0] * 4)]
    found = summary.Results(plan, rows)
    case, base = Case(Arm("prune", "base"), 100), Case(Arm("bon", "base"), 100)
    difference = found.minus(case, base)
    assert difference is not None and difference["mean"] == 1.0
    reverse = found.minus(base, case)
    assert reverse is not None and reverse["mean"] == -1.0
    assert found.minus(Case(Arm("prune", "base"), 200), base) is None and found.minus(base, base) is None
    searches = len(list(order(plan, TWO[1:])))
    assert found.missing()["prune/base"].startswith(f"{searches - 1} of {searches} searches (")


def test_every_arm_is_compared_with_its_own_best_of_n() -> None:
    """Mutants take the base path's for all, or the same budget's at equal cost."""
    plan = planner_of(Study(prompts=PROMPTS, seeds=1), DEAR)
    arm, cheap = Arm("prune", "base"), plan.at_cost(Arm("prune", "base"), 200)
    assert cheap is not None and cheap < 200
    right = {"bon/base": 0.0, "bon/fast": 1.0, "prune/fast": 1.0, "rbf-margin0/vp": 1.0}
    rows = [row_of(plan, name, 200, 0, [share] * 3) for name, share in right.items() if chosen_arms(name)[0] in HERE]
    rows += [row_of(plan, "prune/base", 200, 0, [1.0, 1.0, 0.0]), row_of(plan, "prune/base", cheap, 0, [0.0, 1.0, 0.0])]
    lines = {f"{line['method']}/{line['path']}": line for line in summary.lines_of(summary.Results(plan, rows))}
    assert lines["prune/base"]["difference"]["heldout"]["mean"] == pytest.approx(2 / 3)
    assert lines["prune/base"]["at_cost"]["budget"] == cheap
    assert lines["prune/base"]["at_cost"]["difference"]["heldout"]["mean"] == pytest.approx(1 / 3)
    assert lines["prune/base"]["at_cost"]["cost_ms"] <= lines["bon/base"]["cost_ms"] < lines["prune/base"]["cost_ms"]
    assert lines["rbf-margin0/vp"]["difference"]["heldout"]["mean"] == 1.0
    assert lines["bon/base"]["difference"]["heldout"] is None
    if "prune/fast" in lines:
        assert lines["prune/fast"]["difference"]["heldout"]["mean"] == 0.0
    assert summary.line_of(summary.Results(plan, rows), Case(arm, 200), Case(arm, 200))["filled"] < 1


@pytest.fixture
def auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` and the fast path, as if they were there."""
    monkeypatch.setitem(design.METHODS, "auto", {"method": "prune"})
    monkeypatch.setitem(design.PATHS, "fast", {**design.PATHS["base"], "steps": 8})


@pytest.mark.usefixtures("auto")
def test_goals_are_reached_missed_or_not_known() -> None:
    plan = many(40, seeds=1)
    better, worse = [1.0] * 30 + [0.0] * 10, [0.0] * 40
    rows = [row_of(plan, "auto/base", 100, 0, better), row_of(plan, "bon/base", 100, 0, worse)]
    rows += [row_of(plan, "auto/base", 200, 0, [0.0] * 2 + [1.0] * 38)]
    rows += [row_of(plan, "bon/base", 200, 0, [1.0] * 37 + [0.0] * 3)]
    rows += [row_of(plan, "auto/fast", 50, 0, worse), row_of(plan, "bon/fast", 50, 0, better)]
    rows += [row_of(plan, "auto/fast", 200, 0, worse), row_of(plan, "rbf-margin0/vp", 500, 0, better)]
    found = {each["what"]: each["reached"] for each in summary.goals(summary.Results(plan, rows), None)}
    assert found["auto/base - bon/base, 100 NFE, equal NFE"] is True
    assert found["auto/base - bon/base, 200 NFE, equal NFE"] is False  # ahead, but not beyond the interval
    assert found["auto/fast - bon/fast, 50 NFE, equal NFE"] is False
    assert found["auto/fast 200 NFE - rbf-margin0/vp 500 NFE"] is False
    assert found["auto/fast 200 NFE - rbf-margin1/vp 500 NFE"] is None
    assert found["auto/base - bon/base, 500 NFE, equal NFE"] is None
    assert len([what for what in found if "equal" in what]) == 2 * 8


@pytest.mark.usefixtures("auto")
def test_the_best_of_the_others_is_chosen_on_the_tuning_half() -> None:
    """Here SVDD is the best there, and CoDe on the held-out half: the mutant that looks at the latter takes it."""
    tuning, held = many(10, seeds=1, split="tuning"), many(10, seeds=1)

    def shares(plan: Planner, best: str) -> list[run.Row]:
        share = {str(arm): 0.5 for arm in ARMS if arm.method != "ode"} | {best: 0.9, "auto/fast": 0.6}
        return [
            row_of(plan, name, 500, 0, [1.0] * round(10 * s) + [0.0] * round(10 - 10 * s)) for name, s in share.items()
        ]

    results = summary.Results(held, shares(held, "code/vp")), summary.Results(tuning, shares(tuning, "svdd/vp"))
    (goal,) = summary.against_all(*results)
    assert goal["what"].startswith("auto/fast - svdd/vp") and goal["reached"] is True
    assert goal["difference"]["mean"] == pytest.approx(0.1)
    (goal,) = summary.against_all(results[0], summary.Results(tuning, shares(tuning, "svdd/vp")[:-1]))
    assert goal["difference"] is None and goal["reached"] is None


# ---- the command ----


def test_the_whole_command_and_its_document(constants: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(design, "hard_prompts", lambda split: list(PROMPTS))
    folder = constants("out/heldout")
    docs = tmp_path / "docs" / "results.md"
    docs.parent.mkdir()
    docs.write_text("# Results\n\n## Before\n\nstays\n")
    argv = ["--out", str(tmp_path / "out"), "--arms", "bon/base,prune/base,ode/base", "--budgets", "50,100"]
    readme = tmp_path / "README.md"
    readme.write_text("# x\n<!-- search_evidence -->\nold\n<!-- /search_evidence -->\nstays\n")
    assert command.main([*argv, "--seeds", "1", "--docs", str(docs), "--readme", str(readme)]) == 0
    head, *rows, last, stays = readme.read_text().strip().splitlines()[1:]
    assert (last, stays) == ("<!-- /search_evidence -->", "stays") and "50 NFE" in rows[0] and len(rows) == 2 + 5
    assert [row.split("|")[1].strip() for row in rows[2:]] == [name for name, _ in shown.FRONT]
    assert all("[" in row for row in rows[2:4]) and rows[4].count("[") == 0  # auto was left out of this run
    found = json.loads((folder / "results.json").read_text())
    assert [(row["method"], row["budget"]) for row in found["rows"]] == [
        ("ode", 50), ("bon", 50), ("bon", 100), ("prune", 50), ("prune", 100)
    ]  # fmt: skip
    assert found["constants"] == asdict(COSTS) and "smc/vp" in found["missing"] and "bon/base" not in found["missing"]
    first = docs.read_text()
    assert first.startswith("# Results\n\n## Before\n\nstays\n\n## Search on scenes\n\n<!-- search_evidence -->\n")
    assert (folder / "table.md").read_text() in first and "5.000 ms" in first and str(tmp_path) not in first
    for name in ("search_curve.png", "search_contact.png"):
        assert Image.open(docs.parent / "images" / name).size[0] > 500
    with (folder / run.ROWS).open("a") as file:
        file.write('{"method": "bo')  # another process is writing
    before = (folder / run.ROWS).read_bytes()
    docs.write_text(first + "\n## Behind\n")
    assert command.main([*argv, "--seeds", "1", "--docs", str(docs), "--summary"]) == 0
    assert docs.read_text() == first + "\n## Behind\n"
    assert (folder / run.ROWS).read_bytes() == before


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "plain.md").write_text("# x\n")
    with pytest.raises(OutputError, match="expected .*plain.md to have a line <!-- search_evidence -->"):
        shown.write_readme(tmp_path / "plain.md", summary.Results(planner_of(SMALL), []))
    assert command.main(["--out", str(tmp_path), "--arms", "bom"]) == 2
    assert "no arm 'bom'" in capsys.readouterr().err
    assert issubclass(OutputError, FlowfastError)
