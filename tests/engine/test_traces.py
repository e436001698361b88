"""The engines of Python and C++ are twins: the traces that csrc/runner/tests/test_trace.cpp replays tell the same story
here. Within one step C++ tells by slot, a request's end behind its round; here a round of all comes first, for on a
device its report may lag, and then the ends. So a step's rounds and ends are compared by slot."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowfast.engine import clock, core
from flowfast.engine.core import EngineCore
from flowfast.engine.request import Event, Failed, Found, Job, Progress
from flowfast.engine.scheduler import Batch, Scheduler
from tests.engine.fake_runner import Ask, FakeMaker, World, job_of

TRACES = json.loads(Path(__file__).with_name("traces.json").read_text())


class Replay:
    """One trace on a core of its own. A micro-batch holds every round whole, so that all rounds take as long."""

    def __init__(self, trace: dict[str, Any], patch: pytest.MonkeyPatch):
        self.trace, self.world = trace, World(slots=trace["slots"], seconds=trace["seconds"], of_round=True)
        patch.setattr(clock, "now", lambda: self.world.now)
        self.core = EngineCore(FakeMaker(self.world), micro_batch=64, most_waiting=trace["most_waiting"])
        self.jobs: dict[str, Job] = {}
        self.ended: set[str] = set()

    def run(self) -> list[list[str]]:
        told: list[list[str]] = []
        for entry in self.trace["do"]:
            if "add" in entry:
                self.add(**entry["add"])
            elif "abort" in entry:
                if entry["abort"] not in self.ended:  # as the public engine: nobody of this name runs
                    self.core.abort(self.jobs[entry["abort"]])
            elif "wait" in entry:
                self.world.now += entry["wait"]
            else:
                for _ in range(entry["step"]):
                    told += self.step()
        return told

    def add(self, id: str, rounds: int, priority: int, deadline: float | None, fails: Any) -> None:
        if fails == "admit":
            self.world.admit_fails.add(id)
        elif fails is not None:
            ((what, at),) = fails.items()
            {"reward": self.world.reward_fails, "model": self.world.model_fails}[what].add((id, at))
        ask = Ask(id, transitions=rounds, priority=priority, deadline=deadline)
        self.jobs[id] = job_of(ask, len(self.jobs), self.world.now)
        self.core.add(self.jobs[id])

    def step(self) -> list[list[str]]:
        slots: dict[str, int] = {}
        admit = Batch.put

        def put(batch: Batch, slot: int, job: Job) -> None:
            slots[job.request.id] = slot
            admit(batch, slot, job)

        for _, slot, job in self.core.scheduler.running():
            slots[job.request.id] = slot
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Batch, "put", put)
            events = [event for event in self.core.step() if not isinstance(event, Found)]
        self.ended |= {event.id for event in events if not isinstance(event, Progress)}
        before = [event for event in events if isinstance(event, Failed)]
        after = sorted((event for event in events if not isinstance(event, Failed)), key=lambda event: slots[event.id])
        assert events[: len(before)] == before, "a failure comes before what its step's round brings"
        return [words(event) for event in before + after]


def words(event: Event) -> list[str]:
    reason = [event.reason] if isinstance(event, Failed) else []
    return [event.id, type(event).__name__.lower(), *reason]


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: trace["name"])
def test_python_tells_what_cpp_tells(trace: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert Replay(trace, monkeypatch).run() == trace["events"]


@pytest.mark.parametrize(
    ("owner", "name", "changed"),
    [
        (Job, "place", property(lambda job: job.arrived)),
        (Batch, "free", property(lambda batch: max((s for s, job in enumerate(batch.jobs) if not job), default=None))),
        (Scheduler, "full", lambda scheduler, job, most, slots: scheduler.count >= most),
        (core, "too_late", lambda scheduler, job, slots, now: None),
        (EngineCore, "_aborted", property(lambda core: [], lambda core, jobs: None)),
    ],
    ids=["no priority", "highest slot first", "free slots are waited for", "no door", "no abort"],
)  # fmt: skip
def test_a_core_with_other_rules_tells_otherwise(
    owner: Any, name: str, changed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, name, changed, raising=False)
    assert any(Replay(trace, monkeypatch).run() != trace["events"] for trace in TRACES)
