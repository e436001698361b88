"""`flowfast explain`: what it says is what a search then does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import flowfast
from flowfast import rewards
from flowfast.calibration.explain import explained
from flowfast.cli import main
from flowfast.config import make_config
from tests.calibration.banks import path_of, walk
from tests.calibration.test_auto import SEEING, calibrated
from tests.toys import METHODS, GaussianFlow, NearTarget

METHODS_IN_STEP = ["bon", "ode", "prune", "smc", "code", "svdd"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("budget", [24, 60])
def test_its_costs_are_those_of_the_search(method: str, budget: int) -> None:
    options: dict[str, Any] = {"method": method, "budget": budget, "steps": 6}
    found = explained(GaussianFlow(), NearTarget(), make_config(options))
    sample = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), **options).samples[0]
    assert sample.nfe <= found.nfe <= budget
    assert sample.reward_calls <= found.scores
    if method in METHODS_IN_STEP:
        assert (sample.nfe, sample.reward_calls) == (found.nfe, found.scores)
    assert [step.nfe for step in found.steps] == sorted(step.nfe for step in found.steps)


def test_of_auto_it_says_what_it_takes_and_what_else_there_is(tmp_path: Path) -> None:
    rewards_ = walk(8, 24, SEEING)
    flow = calibrated(tmp_path, path_of(rewards_), path_of(rewards_[:, :, [1, 3, 5]] - 9))
    found = explained(flow, NearTarget(), make_config({"budget": 60}))
    result = flowfast.search(flow, ["a"], reward=NearTarget(), budget=60)
    assert found.picked == result.config.picked and found.method == result.samples[0].method
    assert (found.nfe, found.scores) == (result.samples[0].nfe, result.samples[0].reward_calls)
    assert found.seconds == pytest.approx(0.01 * found.nfe + 0.003 * found.scores)
    means = {name: choice.mean for name, choice in found.alternatives.items()}
    assert means["best on the calibration"] == max(means.values())
    assert {"best-of-n, path 1", "best-of-n, path 2", "prune's default, path 1"} <= set(means)
    assert means["best-of-n, path 2"] < means["best-of-n, path 1"]


def test_the_command_prints_plan_calibration_and_cost(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "two red circles", "--budget", "100"]) == 0
    told = capsys.readouterr().out
    for part in ("method: ", "why: ", "path: ", "NFE so far", "of 100 NFE", "calibration: ", "best-of-n, path 1"):
        assert part in told


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--seconds", "2"], "expected a budget in NFE"),
        (["--budget", "3"], "but the budget is 3: raise it"),
        (["--calibration", "not-there.json"], "cannot read the calibration not-there.json"),
        (["--option", "n=3"], "method 'auto' has no option 'n'"),
    ],
)
def test_what_cannot_run_is_one_line(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "two red circles", *options]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert says in line and line.startswith("flowfast: ")


def test_a_reward_without_a_calibration_has_no_seconds() -> None:
    flow = flowfast.load("scenes")
    found = explained(flow, rewards.load("sharpness", flow), make_config({"budget": 100, "reward": "sharpness"}))
    assert found.seconds is None and found.bank is None and found.alternatives == {}
    assert found.picked is not None and "not of this reward 'sharpness'" in found.picked.why
