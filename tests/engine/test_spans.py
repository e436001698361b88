"""Spans of a round: in order and balanced for NVTX, and in the Chrome trace of --profile."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

import flowfast
from flowfast import cli
from flowfast.engine import spans
from tests.toys import GaussianFlow, NearTarget

NAMES = ["branch", "velocity", "decode", "reward", "decide"]


@pytest.fixture
def heard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a listener would hear of the NVTX domain."""
    found: list[str] = []
    domain = SimpleNamespace(push_range=found.append, pop_range=lambda: found.append("end"))
    monkeypatch.setattr(spans, "_domain", domain)
    for name in NAMES:
        monkeypatch.setattr(getattr(spans, name.upper()), "_attributes", name)
    return found


def test_a_round_is_five_ranges_in_order(heard: list[str]) -> None:
    result = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), method="rbf", budget=20, steps=5)
    assert heard == [word for _ in range(result.rounds) for name in NAMES for word in (name, "end")]


def test_a_range_ends_where_its_part_fails(heard: list[str]) -> None:
    def bad(images, prompts):
        raise ValueError("no")

    with pytest.raises(flowfast.errors.RewardError):
        flowfast.search(GaussianFlow(), ["a"], reward=bad, method="rbf", budget=20, steps=5)
    assert heard[-2:] == ["reward", "end"]


@pytest.mark.parametrize("folder", [".", "new/folder"])
def test_profile_writes_a_chrome_trace(tmp_path: Path, folder: str) -> None:
    trace = tmp_path / folder / "trace.json"
    small = ["--reward", "sharpness", "--budget", "40", "--steps", "5", "--method", "bon"]
    argv = ["generate", "two red circles", *small, "--out", str(tmp_path / "o"), "--profile", str(trace)]
    assert cli.main(argv) == 0
    events = json.loads(trace.read_text())["traceEvents"]
    candidates = (tmp_path / "o" / "00-two-red-circles" / "candidates.jsonl").read_text().splitlines()
    rounds = 1 + max(json.loads(line)["round"] for line in candidates)
    seen = Counter(event["name"] for event in events if event.get("name", "").startswith("flowfast: "))
    scored = {"decode", "reward"}  # of best-of-n the last round
    assert seen == {f"flowfast: {name}": 1 if name in scored else rounds for name in NAMES}
    assert [path.name for path in trace.parent.glob("*.part")] == []


def test_a_trace_that_cannot_be_written_is_refused_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        cli.main(["generate", "two red circles", "--out", str(tmp_path / "o"), "--profile", "/proc/none/t.json"]) == 2
    )
    assert "cannot write /proc/none" in capsys.readouterr().err
    assert not (tmp_path / "o").exists()
