"""Who is next: which waiting request moves into which slot, and which batch has its turn."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flowfast.engine import clock
from flowfast.engine.deadline import Pacer, Rest, share
from flowfast.engine.request import Job
from flowfast.engine.runner import Runner
from flowfast.errors import FlowfastError

IDLE_SECONDS = 60.0
"""After which a batch that nobody uses is freed."""
MOST_PASSED = 8
"""Turns that others with a deadline may take before a batch that waits."""


@dataclass(eq=False)
class Batch:
    """A batch of slots, and whose requests are in them."""

    kind: Hashable
    runner: Runner
    jobs: list[Job | None]
    example: Job
    """Any of its kind."""
    apart: bool = False
    """Does its reward run on the host while another batch of its kind has the device?"""
    number: int = 0
    """In the order in which batches were made."""
    pacer: Pacer = field(default_factory=Pacer)
    under_way: bool = False
    """Has a round begun whose scores have not decided yet?"""
    live: int = 0
    """Slots that are taken."""
    passed: int = 0
    idle_since: float = 0.0

    def put(self, slot: int, job: Job) -> None:
        """The slot is the job's, in the books alone."""
        self.jobs[slot] = job
        self.live += 1

    def clear(self, slot: int) -> None:
        self.jobs[slot] = None
        self.live -= 1

    def job(self, slot: int) -> Job:
        """Of a slot that is taken."""
        found = self.jobs[slot]
        assert found is not None
        return found

    def go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Back to what its runner had held, with its jobs as they stand in the books. Raises ValueError."""
        for slot in self.taken:
            self.runner.admit(slot, self.job(slot))
        self.runner.go_on(tensors, facts)

    def cut_late(self, now: float, needed: Callable[[float], float]) -> None:
        """Where the rounds that are planned would end late, requests with a deadline get less; also repeats the cuts
        that a request brings along. needed(due): seconds that all who are due by then still take."""
        shares: dict[float, float] = {}
        for slot in self.taken:
            job, at = self.job(slot), self.runner.rounds[slot]
            cuts = [cut for cut in job.repeats if cut[0] == at]
            if job.due is not None:
                if job.due not in shares:
                    shares[job.due] = share(needed(job.due), job.due - now, self.pacer.round_seconds)
                rest = self.runner.rest([slot]).nfe
                cuts = [(at, int(shares[job.due] * rest))] if rest and shares[job.due] < 1.0 else []
            if cuts:
                job.cuts += cuts
                self.runner.limit(slot, job.plan.forecast(job.cuts))

    @property
    def taken(self) -> list[int]:
        return [slot for slot, job in enumerate(self.jobs) if job is not None]

    @property
    def free(self) -> int | None:
        """The first free slot."""
        return self.jobs.index(None) if self.live < len(self.jobs) else None

    def slack(self, now: float) -> float:
        """Seconds that its most urgent request could wait; infinite without deadlines."""
        dues = [job.due for job in self.jobs if job is not None and job.due is not None]
        return min(dues) - now - self.seconds(self.taken) if dues else float("inf")

    def seconds(self, slots: list[int]) -> float:
        """What the rounds to come of these slots take at its pace, with what their neighbours have in them."""
        rounds = len(self.runner.rest(slots).widths)
        rest = Rest(*(each[:rounds] for each in self.runner.rest(self.taken)))
        return self.pacer.seconds(self.pacer.work(rest, 1, self.runner.micro_batch))


class NoRoomError(Exception):
    """There is no memory for another batch before one that runs is done."""


class Scheduler:
    """Waiting requests and batches. `make(job, alike)` makes a batch that can run the job beside `alike` others of its
    kind, or answers None: there are enough. Raises NoRoomError."""

    def __init__(self, make: Callable[[Job, int], Batch | None]):
        self.make = make
        self.batches: list[Batch] = []
        self.count = 0
        """Of those that wait."""
        self._waiting: dict[Hashable, list[tuple[float, int, Job]]] = {}
        self._numbers = itertools.count()

    # ---- who waits ----

    def add(self, job: Job) -> None:
        self.count += 1
        heapq.heappush(self._waiting.setdefault(job.kind, []), (job.place, job.number, job))

    def full(self, newcomer: Job, most: int, slots: Callable[[Job], int]) -> bool:
        """Would it wait beside `most` others? Those for whom one of the slots of their kind is free do not wait."""
        if self.count < most:
            return False
        jobs = [job for job in self.jobs() if not job.aborted]
        there, like = Counter(job.kind for job in jobs), {job.kind: job for job in [*jobs, newcomer]}
        beyond = {kind: there[kind] - slots(job) for kind, job in like.items()}
        return beyond[newcomer.kind] >= 0 and sum(max(0, count) for count in beyond.values()) >= most

    def waiting(self) -> list[Job]:
        """In the order of their numbers."""
        return sorted((job for heap in self._waiting.values() for *_, job in heap), key=lambda job: job.number)

    def jobs(self) -> Iterator[Job]:
        """All that run or wait."""
        yield from (job for heap in self._waiting.values() for *_, job in heap)
        yield from (job for *_, job in self.running())

    def drop(self, jobs: list[Job]) -> None:
        """These wait no more."""
        gone = {job.number for job in jobs}
        for kind, heap in list(self._waiting.items()):
            kept = [entry for entry in heap if entry[1] not in gone]
            heapq.heapify(kept)
            self.count -= len(heap) - len(kept)
            self._set(kind, kept)

    def _set(self, kind: Hashable, heap: list[tuple[float, int, Job]]) -> None:
        if heap:
            self._waiting[kind] = heap
        else:
            self._waiting.pop(kind, None)

    # ---- who runs ----

    def running(self) -> Iterator[tuple[Batch, int, Job]]:
        for batch in self.batches:
            for slot, job in enumerate(batch.jobs):
                if job is not None:
                    yield batch, slot, job

    def fill(self) -> Iterator[tuple[Job, FlowfastError | torch.OutOfMemoryError]]:
        """Moves waiting requests into free slots, the first in place first; those that could not be, with the reason.
        Where one waits for memory, none behind it moves in, so that others drain and it gets its turn."""
        for kind in sorted(self._waiting, key=lambda kind: self._waiting[kind][0][:2]):
            while heap := self._waiting.get(kind):
                job, failed = heap[0][2], None
                try:
                    if not self._place(job):
                        break
                except NoRoomError:
                    return
                except (FlowfastError, torch.OutOfMemoryError) as error:
                    failed = error
                heapq.heappop(heap)
                self.count -= 1
                self._set(kind, heap)
                if failed is not None:
                    yield job, failed

    def _place(self, job: Job) -> bool:
        alike = [batch for batch in self.batches if batch.kind == job.kind]
        batch = next((each for each in alike if not each.under_way and each.free is not None), None)
        if batch is None:
            batch = self.make(job, len(alike))
            if batch is not None:
                self.take_on(batch)
        if batch is None or batch.free is None:
            return False
        slot = batch.free
        batch.runner.admit(slot, job)
        batch.put(slot, job)
        job.moved_in = clock.now()
        return True

    def make_room(self, has_room: Callable[[list[Batch]], bool]) -> None:
        """Frees idle batches where memory is short. Raises NoRoomError."""
        if not has_room(self.batches):
            self.batches = [batch for batch in self.batches if batch.live]
            if self.batches and not has_room(self.batches):
                raise NoRoomError

    def take_on(self, batch: Batch) -> None:
        batch.number = next(self._numbers)
        self.batches.append(batch)

    def in_order(self) -> list[Batch]:
        """As they were made, which is also the order in which they go on after all of them stopped."""
        self.batches.sort(key=lambda batch: batch.number)
        return list(self.batches)

    def next(self, now: float) -> Batch | None:
        """The batch that starts a round: the one with the least slack, else in turn."""
        ready = [batch for batch in self.batches if batch.live and not batch.under_way]
        if len(ready) < 2:
            return ready[0] if ready else None
        chosen = ready[0]
        waited = max(ready, key=lambda batch: batch.passed)
        urgent = min(ready, key=lambda batch: batch.slack(now))
        if urgent.slack(now) < float("inf"):
            chosen = waited if waited.passed >= MOST_PASSED else urgent
        for batch in ready:
            batch.passed += 1
        chosen.passed = 0
        self.batches.remove(chosen)
        self.batches.append(chosen)
        return chosen

    def needed(self, due: float) -> float:
        """Seconds that all requests which are due by then still take, as far as that is known."""
        seconds = 0.0
        for batch in self.batches:
            seconds += batch.seconds([s for s, job in enumerate(batch.jobs) if job and job.due and job.due <= due])
        for kind, heap in self._waiting.items():
            like = next((batch for batch in self.batches if batch.kind == kind), None)
            if like is not None:
                work = sum(self._waiting_work(job, like) for *_, job in heap if job.due is not None and job.due <= due)
                seconds += like.pacer.seconds(work)
        return seconds

    def _waiting_work(self, job: Job, like: Batch) -> float:
        """Its share of a batch full of requests like it."""
        slots, M = like.runner.slots, like.runner.micro_batch
        rest = Rest(job.forecast.widths, job.forecast.null, job.forecast.scored)
        return like.pacer.work(rest, slots, M) / slots

    def free_idle(self, now: float) -> None:
        """Frees the batches that nobody has used for a minute."""
        for batch in self.batches:
            if batch.live:
                batch.idle_since = now
        self.batches = [batch for batch in self.batches if now - batch.idle_since <= IDLE_SECONDS]

    def remove(self, batch: Batch) -> None:
        self.batches.remove(batch)
