"""Seconds by part of a round."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from flowfast.engine import clock


def test_an_engine_that_runs_for_long_keeps_few_marks_of_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """And loses none of their seconds; those that the device has not passed yet are not asked for theirs."""
    ticks, passed = itertools.count(), [0]

    class Event:
        def __init__(self, enable_timing: bool):
            self.at = next(ticks)

        def record(self) -> None:
            pass

        def query(self) -> bool:
            return self.at <= passed[0]

        def elapsed_time(self, other: Event) -> float:
            assert self.query() and other.query()
            return float(other.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: passed.__setitem__(0, 10**9))
    found: Any = clock.Clock(torch.device("cuda"))
    most = 0
    for round in range(20_000):
        passed[0] = max(0, 3 * round - 9_000)
        found.mark()
        found.mark("model")
        found.mark("reward")
        most = max(most, len(found.marks))
    assert most < clock.MOST_MARKS + 10_000 and len(found.marks) < most
    assert found.read() == pytest.approx({"model": 20.0, "decode": 0.0, "reward": 20.0, "search": 0.0})
    found.mark()
    found.mark("search")
    assert found.read()["search"] == pytest.approx(0.001) and len(found.marks) == 1
