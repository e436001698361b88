"""The engine's core on batches without a model: any interleaving of requests, aborts, faults, clocks and sizes keeps
its rules, and each mutant of it breaks one."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch

from flowfast.engine import clock, core, memory, scheduler
from flowfast.engine.core import EngineCore
from flowfast.engine.request import Event, Failed, Finished, Job
from flowfast.engine.scheduler import Batch, Scheduler
from flowfast.errors import FlowfastError, ModelError, OutputError
from tests.engine.drive import Drive
from tests.engine.fake_runner import Ask, FakeMaker, World, alone, job_of

STEPS, DRIVES = 60, 200


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No garbage worth collecting where memory only seems to run out."""
    monkeypatch.setattr(gc, "collect", lambda *_: 0)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Drive]:
    """A drive with this seed, whose world is the clock."""

    def made(seed: int) -> Drive:
        monkeypatch.setattr(clock, "now", lambda: 0.0)
        found = Drive(seed)
        monkeypatch.setattr(clock, "now", lambda: found.world.now)
        return found

    return made


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    found = World()
    monkeypatch.setattr(clock, "now", lambda: found.now)
    return found


def test_the_core_keeps_its_rules_in_any_interleaving(drive: Callable[[int], Drive]) -> None:
    steps, reasons, cut = 0, set(), 0
    for seed in range(DRIVES):
        one = drive(seed)
        one.run(STEPS)
        steps += STEPS
        reasons |= {event.reason for event in one.ended.values() if isinstance(event, Failed)}
        cut += sum(bool(event.rerun.cuts) for event in one.ended.values() if isinstance(event, Finished))
    assert steps >= 10_000 and cut > 20
    assert reasons == {"aborted", "full", "deadline", "prompt", "reward", "model"}  # all of them came up


def test_a_request_alone_gets_what_the_drive_expects(world: World) -> None:
    for number, ask in enumerate((Ask("a"), Ask("b", transitions=2, tries=3), Ask("c", transitions=5, ends_at=2))):
        events = run([ask], world)
        assert isinstance(events[-1], Finished)
        assert int(events[-1].sample.image) == alone(ask, ask.budget)
        assert events[-1].sample.nfe == min(ask.budget, ask.ends_at), number


def engine(world: World, micro_batch: int = 1, **options: Any) -> EngineCore:
    return EngineCore(FakeMaker(world), micro_batch=micro_batch, **options)


def run(asks: list[Ask], world: World, micro_batch: int = 1, **options: Any) -> list[Event]:
    """All that these are told."""
    one, events = engine(world, micro_batch, **options), list[Event]()
    for number, ask in enumerate(asks):
        one.add(job_of(ask, number, world.now))
    while one.busy:
        events += one.step()
    return events


def ends(events: list[Event]) -> dict[str, str]:
    return {event.id: getattr(event, "reason", "finished") for event in events if isinstance(event, Finished | Failed)}


@pytest.mark.parametrize("priority", [1, 3])
def test_who_waits_gains_a_level_of_priority_in_ten_seconds(priority: int, world: World) -> None:
    """One urgent request more than can be run comes every second."""
    world.slots, one, told = 1, engine(world), list[Event]()
    one.add(job_of(Ask("patient", priority=priority, transitions=1), 0, world.now))
    for number in range(1, 100):
        one.add(job_of(Ask(f"urgent {number}", transitions=1), number, world.now))
        one.add(job_of(Ask(f"urgent too {number}", transitions=1), 1000 + number, world.now))
        told += one.step()
        if "patient" in ends(told):
            break
    # Those that came before it was as old as ten seconds a level are 20 a level, one a second.
    assert world.now <= 20 * priority + 2


def test_a_batch_without_deadlines_has_its_turn_beside_urgent_ones(world: World) -> None:
    world.slots, one, told = 1, engine(world), list[Event]()
    one.add(job_of(Ask("patient", transitions=4), 0, world.now))
    for number in range(1, 60):
        one.add(job_of(Ask(f"urgent {number}", kind="other", transitions=1, deadline=1e3), number, world.now))
        told += one.step()
    assert ends(told)["patient"] == "finished"
    assert sum(isinstance(event, Finished) for event in told) > 45


@pytest.mark.parametrize("micro_batch", [1, 4])
def test_memory_for_no_batch_ends_its_request_and_nobody_else(micro_batch: int, world: World) -> None:
    """Where a smaller micro-batch could be tried, not even that."""
    world.make_fails["b"], world.admit_fails = "memory", {"a"}
    asks = [Ask("a", kind="first"), Ask("b", kind="other"), Ask("c", kind="other"), Ask("d")]
    got = ends(run(asks, world, micro_batch))
    assert got == {"a": "prompt", "b": "model" if micro_batch == 1 else "finished", "c": "finished", "d": "finished"}


def test_a_batch_that_finds_no_memory_again_ends_and_nobody_else(world: World) -> None:
    """Its state was put aside for smaller micro-batches, and then there is no room to put it back."""
    one = engine(world, micro_batch=4)
    for number, ask in enumerate((Ask("a", kind="first"), Ask("b", kind="other"))):
        one.add(job_of(ask, number, world.now))
    told = one.step()
    world.memory.append("")
    world.make_fails["a"] = "memory"
    while one.busy:
        told += one.step()
    assert ends(told) == {"a": "model", "b": "finished"} and one.micro_batch == 2


def test_faults_are_raised_where_they_are_not_contained(world: World) -> None:
    world.reward_fails.add(("b", 2))
    assert ends(run([Ask("a"), Ask("b")], world)) == {"a": "finished", "b": "reward"}
    world.model_fails.add(("b", 2))
    with pytest.raises(ModelError):
        run([Ask("a"), Ask("b")], world, contain=False)


@pytest.mark.parametrize("kind", ["plain", "host"])
def test_a_state_that_cannot_be_saved_is_no_fault_of_who_runs(kind: str, world: World) -> None:
    """A full disk is raised, and nobody is lost: whoever makes room goes on."""
    one, events, full = engine(world), list[Event](), [2]

    def save() -> None:
        full[0] -= 1
        if full[0] >= 0:
            raise OutputError("no space left")

    one.save = save
    asks = [Ask("a", kind=kind, transitions=2), Ask("b", kind=kind), Ask("c", kind=kind, transitions=1)]
    for number, ask in enumerate(asks):
        one.add(job_of(ask, number, world.now))
    raised = 0
    while one.busy:
        try:
            events += one.step()
        except OutputError:
            raised += 1
    assert raised == 2 and ends(events) == {"a": "finished", "b": "finished", "c": "finished"}
    samples = {event.id: int(event.sample.image) for event in events if isinstance(event, Finished)}
    assert samples == {ask.id: alone(ask, ask.budget) for ask in asks}


# ---- mutants: each of these must be seen ----


def let_go(self: EngineCore, batch: Batch, slot: int) -> None:
    self.tell(batch, all_of_them=True)


def twice(self: EngineCore, job: Job, reason: str, error: FlowfastError) -> None:
    self._timed -= job.due is not None
    self._events += 2 * [Failed(job.request.id, reason, error)]


def lost(self: EngineCore, job: Job, reason: str, error: FlowfastError) -> None:
    self._timed -= job.due is not None
    if reason != "reward":
        self._events.append(Failed(job.request.id, reason, error))


AFTER_ROUND, CUT_LATE, TELL, END = EngineCore._after_round, Batch.cut_late, EngineCore.tell, EngineCore.end
PLACE = Scheduler._place


def all_fail(self: EngineCore, batch: Batch, failed: dict[int, FlowfastError]) -> None:
    error = next(iter(failed.values()), None)
    AFTER_ROUND(self, batch, {} if error is None else dict.fromkeys(batch.taken, error))


def into_a_round(self: Scheduler, job: Job) -> bool:
    under_way = [batch for batch in self.batches if batch.under_way]
    for batch in under_way:
        batch.under_way = False
    try:
        return PLACE(self, job)
    finally:
        for batch in under_way:
            batch.under_way = True


def cuts_all(self: Batch, now: float, needed: Callable[[float], float]) -> None:
    CUT_LATE(self, now, needed)
    for slot in self.taken:
        job, at = self.job(slot), self.runner.rounds[slot]
        if job.due is None and sum(self.runner.rest([slot])[0]) > 3:
            job.cuts.append((at, 1))
            self.runner.limit(slot, job.plan.forecast(job.cuts))


def loses_its_batch(of: EngineCore, batch: Batch | None) -> None:
    if batch is not None:
        if batch in of.under_way:
            of.under_way.remove(batch)
        of.scheduler.remove(batch)
    if of.micro_batch > 1:
        memory.shrink(of)


def forgets_to_go_on(self: Batch, tensors: dict[str, torch.Tensor], facts: dict[str, Any]) -> None:
    for slot in self.taken:
        self.runner.admit(slot, self.job(slot))


def late_reports(self: EngineCore, batch: Batch, all_of_them: bool = False) -> None:
    TELL(self, batch)


def keeps_its_batch(self: EngineCore, batch: Batch, error: FlowfastError) -> None:
    END(self, batch, error)
    self.scheduler.batches.append(batch)


def first_always(self: Scheduler, now: float) -> Batch | None:
    return next((batch for batch in self.batches if batch.live and not batch.under_way), None)


def marks_nothing(self: EngineCore, job: Job) -> None:
    self._aborted.append(job)


def counts_twice(self: EngineCore, job: Job) -> None:
    job.aborted = True
    self._aborted.append(job)


MUTANTS: dict[str, tuple[Any, str, Any]] = {
    "a slot is not freed on abort": (EngineCore, "_let_go", let_go),
    "an end is told twice": (EngineCore, "_fails", twice),
    "the end of a failed reward is lost": (EngineCore, "_fails", lost),
    "neighbours fail with the guilty": (EngineCore, "_after_round", all_fail),
    "a round under way is admitted into": (Scheduler, "_place", into_a_round),
    "requests without a deadline are cut": (Batch, "cut_late", cuts_all),
    "out of memory loses the batch": (core, "less_memory", loses_its_batch),
    "another size forgets the state": (Batch, "go_on", forgets_to_go_on),
    "reports of one slot's last request hit the next": (EngineCore, "tell", late_reports),
    "a failed batch goes on": (EngineCore, "end", keeps_its_batch),
    "an aborted request goes on": (EngineCore, "abort", marks_nothing),
    "two aborts are two ends": (EngineCore, "abort", counts_twice),
    "priority is ignored": (Job, "place", property(lambda self: self.arrived)),
    "the first batch has all turns": (Scheduler, "next", first_always),
    "the urgent have all turns": (scheduler, "MOST_PASSED", 10**9),
    "nobody ages": (Job, "place", property(lambda self: self.arrived + 1e6 * self.request.priority)),
    "any number may wait": (EngineCore, "most_waiting", property(lambda self: None, lambda self, most: None)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_breaks_a_rule(mutant: str, drive: Callable[[int], Drive], monkeypatch: pytest.MonkeyPatch) -> None:
    owner, name, changed = MUTANTS[mutant]
    monkeypatch.setattr(owner, name, changed, raising=False)
    with pytest.raises(AssertionError) as broken:
        for seed in range(DRIVES):
            drive(seed).run(STEPS)
    print(broken.value)
