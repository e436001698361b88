"""`flowfast calibrate`: what it runs, and that it goes on where it was killed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import flowfast
from flowfast import calibrate
from flowfast.calibrate import Calibration, numbers, run
from flowfast.calibration.bank import read
from flowfast.cli import main
from flowfast.config import make
from flowfast.errors import FlowfastError, OptionError, OutputError, RewardError

PROMPTS = ("two red circles and one blue square", "one green triangle and two yellow crosses")
SMALL = Calibration(prompts=PROMPTS, chains=3, paths=({"steps": 3}, {"steps": 2, "guidance": 1}))


@pytest.fixture(scope="module")
def flow() -> Any:
    return flowfast.load("scenes")


@pytest.fixture(scope="module")
def whole(flow: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "bank.json"
    run(SMALL, flow, path)
    return path


def facts(path: Path) -> dict[str, Any]:
    """Without what a clock says."""
    found: dict[str, Any] = json.loads(path.read_text())
    return {name: value for name, value in found.items() if not name.startswith("seconds")}


def test_rewards_are_those_of_whole_trajectories(flow: Any, whole: Path) -> None:
    bank = read(whole)
    for path, options in zip(bank.paths, SMALL.paths, strict=True):
        found = np.full(path.rewards.shape, np.nan)

        def note(candidates: list[flowfast.Candidate], found: np.ndarray = found) -> None:
            for each in candidates:
                found[each.prompt, each.chain, each.transition] = each.reward

        flowfast.search(
            flow,
            list(PROMPTS),
            method="bon",
            budget=3 * path.nfe,
            score_all=True,
            on_round=note,
            micro_batch=3,
            **options,
        )
        assert np.allclose(found, path.rewards, rtol=1e-4)
    assert [set(path.passes) for path in bank.paths] == [{2}, {1}]
    assert min(bank.seconds_row, bank.seconds_decode, bank.seconds_reward) > 0
    assert sorted(whole.parent.iterdir()) == [whole]  # no lines are left


@pytest.mark.parametrize("at", [0, 1, 3])
def test_it_goes_on_where_it_was_killed(
    at: int, flow: Any, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[Any] = []
    work = calibrate.run_job

    def counted(*given: Any) -> Any:
        if len(done) == at and not killed:
            killed.append(True)
            raise KeyboardInterrupt
        done.append(given[2])
        return work(*given)

    killed: list[bool] = []
    monkeypatch.setattr(calibrate, "run_job", counted)
    out = tmp_path / "bank.json"
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, flow, out)
    assert not out.exists()
    rows = out.with_name("bank.json.rows.jsonl")
    rows.write_bytes(rows.read_bytes() + b'{"job": [0,')  # a line that the kill cut short
    run(SMALL, flow, out)
    assert len(done) == len(set(done)) == 4
    assert facts(out) == facts(whole)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"seed": 1}, "other seed"), ({"chains": 4}, "other chains"), ({"prompts": PROMPTS[:1]}, "other prompts")],
)
def test_lines_of_another_calibration_are_refused(
    change: dict[str, Any], message: str, flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "run_job", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, flow, tmp_path / "bank.json")
    with pytest.raises(OutputError, match=message):
        run(SMALL.model_copy(update=change), flow, tmp_path / "bank.json")


@pytest.mark.parametrize(
    "line",
    ['{"job": [0, 0]}', "[]", '{"job": [7, 0], "rewards": [], "seconds": {}, "rows": 1, "scored": 1}'],
)
def test_damaged_lines_are_refused(line: str, flow: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, "run_job", stop)
    with pytest.raises(KeyboardInterrupt):
        run(SMALL, flow, tmp_path / "bank.json")
    rows = tmp_path / "bank.json.rows.jsonl"
    rows.write_text(rows.read_text() + line + "\n")
    with pytest.raises(OutputError, match="line 2, is damaged"):
        run(SMALL, flow, tmp_path / "bank.json")


def test_what_is_no_number_ranks_last() -> None:
    found = numbers(np.array([[1.0, np.nan], [np.inf, 3.0], [-np.inf, 2.0]]), "a")
    assert found.tolist() == [[1.0, 2.0], [1.0, 3.0], [1.0, 2.0]]
    with pytest.raises(RewardError, match="no number for any sample of prompt 'a' at transition 1"):
        numbers(np.array([[1.0, np.nan], [2.0, np.nan]]), "a")


@pytest.mark.parametrize(
    ("paths", "message"),
    [(({"colour": 1},), "unknown option 'colour' of a path"), (({"diffusion": "square:3"},), "adds noise")],
)
def test_paths_that_no_bank_has(paths: Any, message: str, flow: Any, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match=message):
        run(SMALL.model_copy(update={"paths": paths}), flow, tmp_path / "bank.json")
    assert not list(tmp_path.iterdir())


def test_numbers_are_bounded() -> None:
    with pytest.raises(FlowfastError, match="chains"):
        make(Calibration, {"prompts": PROMPTS, "chains": 1})


def test_the_command(tmp_path: Path, whole: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts, out = tmp_path / "prompts.txt", tmp_path / "bank.json"
    texts.write_text("\n".join(PROMPTS))
    given = ["--prompts", str(texts), "--chains", "3", "--steps", "3", "--path", "steps=2 guidance=1"]
    assert main(["calibrate", *given, "--out", str(out)]) == 0
    assert facts(out) == facts(whole)
    shown = capsys.readouterr().out
    assert "expected reward" in shown and "path 1: " in shown and str(out) in shown
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert main(["calibrate", *given, "--out", str(tmp_path / "bank.png")]) == 2
    assert "JSON" in capsys.readouterr().err
