"""Drives an engine's core on fake batches by random steps, and holds it to its rules after each of them."""

from __future__ import annotations

import random
from collections import Counter

from flowfast.engine.core import EngineCore
from flowfast.engine.held import held, restore
from flowfast.engine.memory import resize
from flowfast.engine.request import Event, Failed, Finished, Found, Job, Progress
from flowfast.engine.runner import Runner
from flowfast.engine.scheduler import MOST_PASSED, Batch
from tests.engine.fake_runner import Ask, FakeMaker, World, alone, job_of

KINDS = ("plain", "other", "host", "host too")
REASONS = {"aborted", "full", "deadline", "prompt", "reward", "model"}


class Drive:
    """Random work for one core. `world` is also the clock. seed: of the random numbers, which also say how large the
    engine is."""

    def __init__(self, seed: int):
        self.random = random.Random(seed)
        pick = self.random.choice
        self.world = World(
            slots=pick((1, 2, 3, 5)), lag=pick((0, 1, 2)), most_batches=pick((2, 4, 9)), seconds=pick((0.5, 1.0))
        )
        self.most = pick((None, None, 0, 3, 8))
        self.timed, self.faulty = pick((True, False)), pick((True, True, False))
        self.load = pick((0.1, 0.3, 1.0))
        self.core = self.new_core(pick((1, 2, 8)), [])
        self.number = 0
        self.jobs: dict[str, Job] = {}
        self.asks: dict[str, Ask] = {}
        self.ended: dict[str, Event] = {}
        self.aborted: set[str] = set()
        self.aborted_rows: dict[str, int] = {}
        """Rows that they had cost by then."""
        self.told: Counter[str] = Counter()
        self.counted = (0, 0)
        self.passed = dict[Runner, int]()
        """Turns that others had since a batch had one."""

    def new_core(self, micro_batch: int, splits: list[tuple[int, int]]) -> EngineCore:
        maker = FakeMaker(self.world)
        return EngineCore(maker, micro_batch=micro_batch, splits=tuple(splits), most_waiting=self.most)

    # ---- what may happen ----

    def run(self, steps: int) -> None:
        """So many steps, and then on until nothing is left."""
        for _ in range(steps):
            while self.random.random() < self.load:
                self.happen()
                if self.random.random() < 0.4:
                    break
            self.step()
        self.finish()

    def happen(self) -> None:
        what = self.random.random()
        if what < 0.7:
            self.add()
        elif what < 0.9:
            self.abort()
        elif what < 0.93:
            self.world.now += self.random.choice((0.1, 1.0, 20.0))
        elif what < 0.96:
            self.resize()
        elif what < 0.98:
            self.hold()
        elif self.faulty:
            self.world.memory.append(self.random.choice(("", "", "as it decided")))

    def add(self) -> None:
        pick, name = self.random.choice, f"request {self.number}"
        ask = Ask(
            id=name, transitions=pick((1, 2, 3, 6)), tries=pick((1, 1, 4)), kind=pick(KINDS),
            priority=pick((0, 0, 0, -1, 1, 3)),
            deadline=pick((1.0, 5.0, 20.0, 90.0)) if self.timed and self.random.random() < 0.4 else None,
            ends_at=pick((1 << 30, 1 << 30, 1, 2)),
        )  # fmt: skip
        if self.faulty and self.random.random() < 0.2:
            at, world = pick((1, 2, 3)), self.world
            fault = pick(("reward", "reward", "model", "admit", "make", "raises", "answers", "memory"))
            if fault == "reward":
                world.reward_fails.add((name, at))
            elif fault == "model":
                world.model_fails.add((name, at))
            elif fault == "make":
                world.make_fails[name] = pick(("option", "memory"))
            elif fault == "admit":
                world.admit_fails.add(name)
            else:
                world.take_fails[name] = fault
        self.asks[name], self.jobs[name] = ask, job_of(ask, self.number, self.world.now)
        self.number += 1
        full = self.full(ask.kind)
        self.core.add(self.jobs[name])
        told = [event.reason for event in self.core._events if event.id == name and isinstance(event, Failed)]
        assert (told == ["full"]) == full, f"{name} was refused, or it was not"

    def full(self, kind: str) -> bool:
        """Would one of this kind wait beside as many others as may?"""
        scheduler, slots = self.core.scheduler, self.world.slots
        beyond = {}
        for each in KINDS:
            jobs = [*scheduler.waiting(), *(job for *_, job in scheduler.running())]
            room = 2 * -(-slots // 2) if each.startswith("host") else slots
            beyond[each] = sum(job.kind == each and not job.aborted for job in jobs) - room
        waiting = sum(max(0, count) for count in beyond.values())
        return self.most is not None and beyond[kind] >= 0 and waiting >= self.most

    def open(self) -> list[str]:
        return [name for name in self.jobs if name not in self.ended]

    def abort(self) -> None:
        if names := self.open():
            name = self.random.choice(names)
            for _ in range(self.random.choice((1, 1, 2))):
                self.core.abort(self.jobs[name])
            if name not in self.aborted:
                self.aborted.add(name)
                self.aborted_rows[name] = self.world.rows[name]

    def resize(self) -> None:
        rows = self.random.choice((1, 2, 4, 8))
        self.core.splits, self.core.last_micro_batch = [], rows
        resize(self.core, rows)

    def hold(self) -> None:
        """The engine ends, and another one goes on with its state."""
        self.hear(self.core.told())
        tensors, facts = held(self.core)
        self.hear(self.core.told())
        before = self.core
        running = {job.request.id for *_, job in before.scheduler.running()}
        self.core, self.counted = self.new_core(before.last_micro_batch, before.splits), (0, 0)
        for name in self.open():
            old = self.jobs[name]
            job = self.jobs[name] = job_of(self.asks[name], old.number, old.arrived)
            job.cuts, job.splits = list(old.cuts), list(old.splits)
        restore(self.core, tensors, facts, {self.jobs[name].number: self.jobs[name] for name in running})
        most, self.core.most_waiting = self.core.most_waiting, None
        for job in before.scheduler.waiting():
            self.core.scheduler.add(self.jobs[job.request.id])
            self.core.note(self.jobs[job.request.id])
        self.core.most_waiting = most
        for name in self.aborted & set(self.open()):
            self.core.abort(self.jobs[name])

    def step(self) -> None:
        scheduler = self.core.scheduler
        waited = {job.request.id: job for job in scheduler.waiting()}
        turns = {batch.runner: self.turns(batch) for batch in scheduler.batches if batch.live and not batch.under_way}
        began = self.world.now
        self.hear(self.core.step())
        self.check_order(waited)
        late = [name for name, job in waited.items() if job.due is not None and job.due <= began]
        assert all(name in self.ended for name in late), f"{late} wait beyond their deadlines"
        self.check_turns(turns)
        self.check()

    def finish(self) -> None:
        """Until nothing is left; every request has rounds, and each step runs one or lets somebody go."""
        most = 20 + 10 * sum(self.asks[name].budget + 2 for name in self.open())
        for _ in range(most):
            if not self.core.busy:
                break
            self.step()
        core = self.core
        assert not core.busy and not core.step(), "the engine never ends"
        assert self.open() == [], f"nobody was told of {self.open()}"
        assert not core.under_way and not core._aborted and core._timed == 0
        assert not any(job for batch in core.scheduler.batches for job in batch.runner.jobs)  # type: ignore[attr-defined]
        core.scheduler.free_idle(self.world.now + 120)
        core.scheduler.free_idle(self.world.now + 300)
        assert core.scheduler.batches == []

    # ---- the rules ----

    def hear(self, events: list[Event]) -> None:
        for event in events:
            name = event.id
            assert name not in self.ended, f"{event} after {self.ended.get(name)}"
            if isinstance(event, Finished):
                self.check_sample(event)
            elif isinstance(event, Failed):
                self.check_failure(event)
            else:
                assert isinstance(event, Progress | Found)
                assert event.nfe <= self.asks[name].budget
                self.told[name] += isinstance(event, Progress)
            if isinstance(event, Finished | Failed):
                self.ended[name] = event
                rows = self.world.rows[name]
                assert rows == self.aborted_rows.get(name, rows), f"{name} ran on after its abort"

    def check_sample(self, event: Finished) -> None:
        ask, sample = self.asks[event.id], event.sample
        assert event.id not in self.aborted, f"{event.id} was aborted, and finished"
        cuts = event.rerun.cuts
        assert not cuts or ask.deadline is not None, f"{event.id} was cut, and has no deadline"
        assert sample.nfe <= ask.budget
        whole = min(ask.budget, ask.ends_at)
        assert sample.nfe == whole or cuts, f"{event.id} had {sample.nfe} of {whole} rounds"
        assert sample.nfe >= min(ask.transitions, ask.ends_at), f"{event.id} was cut below what it needs"
        assert int(sample.image) == alone(ask, sample.nfe), f"{event.id} did not get what it gets alone"
        assert self.world.decided[event.id] == sample.nfe, f"{event.id} had rounds that were forgotten"
        assert self.told[event.id] >= sample.nfe  # each round of its own, and those until the host knew of its end

    def check_failure(self, event: Failed) -> None:
        world, name, reason = self.world, event.id, event.reason
        assert reason in REASONS
        may = {
            "aborted": name in self.aborted,
            "full": self.most is not None,
            "deadline": self.asks[name].deadline is not None,
            "prompt": name in world.admit_fails,
            "reward": any(id == name for id, _ in world.reward_fails),
            "model": world.blamed[name] or name in world.take_fails,
        }
        assert may[reason], f"{name} failed without a fault of its own: {event}"

    def check_order(self, waited: dict[str, Job]) -> None:
        """Nobody passed one of its kind who stood before it; a level of priority is worth 10 s."""
        still = self.core.scheduler.waiting()
        for _, _, job in self.core.scheduler.running():
            if job.request.id in waited:
                ahead = [place(other) for other in still if other.kind == job.kind]
                assert all(other > place(job) for other in ahead), f"{job.request.id} passed one before it"

    def turns(self, batch: Batch) -> int:
        """Rounds that it has begun."""
        return batch.runner.started  # type: ignore[attr-defined]

    def check_turns(self, before: dict[Runner, int]) -> None:
        """No batch that could run waits for ever."""
        waiting = [batch for batch in self.core.scheduler.batches if self.turns(batch) == before.get(batch.runner)]
        passed = {batch.runner: self.passed.get(batch.runner, 0) + 1 for batch in waiting if batch.live}
        if any(batch not in waiting for batch in self.core.scheduler.batches):  # another had the turn
            self.passed = passed
        assert all(turns <= MOST_PASSED + 2 * len(KINDS) for turns in self.passed.values()), "a batch starves"

    def check(self) -> None:
        core, scheduler = self.core, self.core.scheduler
        assert not self.world.wrong, self.world.wrong
        waiting, running = scheduler.waiting(), [job for *_, job in scheduler.running()]
        assert scheduler.count == len(waiting)
        for batch in scheduler.batches:
            jobs = batch.runner.jobs  # type: ignore[attr-defined]
            assert batch.live == len(batch.taken), "live counts do not match"
            assert all(mine is theirs for mine, theirs in zip(batch.jobs, jobs, strict=True)), "a slot leaks"
            assert batch.under_way == (batch in core.under_way) == (batch.runner.pending is not None)  # type: ignore
        names = Counter(job.request.id for job in waiting + running)
        assert set(names) == set(self.open()) and set(names.values()) <= {1}, "a request is lost, or there twice"
        assert core._timed == sum(job.due is not None for job in waiting + running)
        self.check_counts()

    def check_counts(self) -> None:
        """Of rows: they grow alone, and none is counted twice."""
        before, self.counted = self.counted, (self.core.rows_used, self.core.rows_padded)
        assert all(now >= then for now, then in zip(self.counted, before, strict=True)), "a count of rows falls"
        assert sum(self.counted) <= self.core.rows_seen, "a row is counted twice"


def place(job: Job) -> tuple[float, int]:
    """Among the waiting."""
    return job.arrived + 10.0 * job.request.priority, job.number
