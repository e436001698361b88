"""The engine: requests come and go, and each `step` is one round of one batch."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch

from flowfast.engine import clock, deadline
from flowfast.engine.admission import too_late
from flowfast.engine.memory import less_memory, no_memory, resize
from flowfast.engine.outputs import events_of, rows_of
from flowfast.engine.request import Event, Failed, Finished, Job
from flowfast.engine.runner import Runner
from flowfast.engine.scheduler import Batch, Scheduler
from flowfast.errors import (
    AbortedError,
    DeadlineError,
    FlowfastError,
    OutputError,
    PromptError,
    QueueFullError,
    RewardError,
)
from flowfast.types import Sample


class Maker(Protocol):
    """Makes what runs a batch for an engine."""

    def batches(self, job: Job, micro_batch: int) -> int:
        """How many batches of the job's kind there may be: two take turns where a reward on the host scores one while
        the device runs the other."""

    def slots(self, job: Job, batches: int) -> int:
        """Of each of so many batches of the job's kind."""

    def has_room(self, batches: list[Batch], job: Job, micro_batch: int, slots: int) -> bool:
        """Is there memory for one of so many slots beside these?"""

    def runner(self, job: Job, micro_batch: int, slots: int, apart: bool) -> Runner:
        """A batch for jobs of this kind; apart: one of several that take turns. Raises OptionError where it could not
        fit the device."""

    def ran_out(self, before: int, micro_batch: int) -> None:
        """A round did not fit into memory; from here on micro-batches are so large."""


class EngineCore:
    """Schedule, run, hand out. One thread's own.

    Args:
        make: makes batches.
        micro_batch: rows of a model call, at most; the maker may give a batch fewer.
        splits: (rounds, rows): until so many rounds have run, a model call has so many rows.
        most_waiting: requests that may wait for a slot; None: any number.
        contain: what fails ends the requests that it belongs to, as `Failed`; else it is raised.
        polls: reports are read, which say what happened and when a request has ended before its plan.
    """

    def __init__(
        self, make: Maker, *, micro_batch: int, splits: tuple[tuple[int, int], ...] = (),
        most_waiting: int | None = None, contain: bool = True, polls: bool = True,
    ):  # fmt: skip
        self.make, self.contain, self.polls, self.most_waiting = make, contain, polls, most_waiting
        self.last_micro_batch, self.splits = micro_batch, list(splits)
        self.rounds = self.rows_seen = self.rows_used = self.rows_padded = self.nan_rewards = self.halved = 0
        self.micro_batch = self.rows_at(0)
        self.scheduler = Scheduler(self._batch)
        self.under_way: deque[Batch] = deque()
        self.pace: deadline.Pace | None = None
        """What a micro-batch takes, as far as that is known before the first round."""
        self.save: Callable[[], None] | None = None
        """Called when a request is done and before its sample is decoded."""
        self.kept_in = ""  # where what was found is kept, for errors
        self.last = clock.now()  # when the last round ended, or work began
        self._events: list[Event] = []
        self._aborted: list[Job] = []
        self._timed = 0  # requests with a deadline
        self._repeating = False  # does any repeat the cuts of another search?
        self._look = False  # may something be done that no round has shown?

    def rows_at(self, rounds: int) -> int:
        """The micro-batch after so many rounds."""
        return next((rows for until, rows in self.splits if rounds < until), self.last_micro_batch)

    # ---- requests ----

    def add(self, job: Job) -> None:
        """Takes a request on; where it cannot be, the next step says so."""
        name, most = job.request.id, self.most_waiting
        if most is not None and self.scheduler.full(job, most, partial(slots_of, self)):
            full = QueueFullError(f"{most} requests wait already, as many as may: try again later")
            self._events.append(Failed(name, "full", full))
        elif job.due is not None and (late := too_late(self.scheduler, job, partial(slots_of, self), clock.now())):
            self._events.append(Failed(name, "deadline", late))
        else:
            self.last = self.last if self.busy else clock.now()
            self.note(job)
            self.scheduler.add(job)

    def note(self, job: Job) -> None:
        self._timed += job.due is not None
        self._repeating |= bool(job.repeats)

    def go_on(self, batch: Batch) -> None:
        """Takes on a batch whose requests were held in the middle of their search."""
        self.scheduler.take_on(batch)
        for slot in batch.taken:
            self.note(batch.job(slot))
            batch.job(slot).counted = None
        self._look = True

    def abort(self, job: Job) -> None:
        """No model call that begins now sees it; the next step says that it is gone."""
        if not job.aborted:
            job.aborted = True
            self._aborted.append(job)

    @property
    def busy(self) -> bool:
        """Is there anything to do or to tell?"""
        return bool(self._events or self.scheduler.count or any(batch.live for batch in self.scheduler.batches))

    # ---- a step ----

    def step(self) -> list[Event]:
        """One round of one batch; what happened since the last step, in order."""
        batch: Batch | None = None
        out_of_memory = False
        if self._aborted or self._timed:
            self._leave()
        try:
            if self._look or self.scheduler.count:
                self._fill()
            batch = self.scheduler.next(clock.now())
            if batch is not None:
                batch.runner.start(batch.jobs)
                batch.under_way = True
                self.under_way.append(batch)
            ahead = int(batch is not None and batch.apart)  # its reward is at work: another batch may start
            if len(self.under_way) > ahead:
                batch = self.under_way[0]
                failed = batch.runner.finish()
                self.under_way.popleft().under_way = False
                self._after_round(batch, failed)
        except torch.OutOfMemoryError:
            out_of_memory = True
        except OutputError:  # its state could not be saved: what is done is handed out by the next step
            self._look = True
            raise
        except FlowfastError as error:
            if not self.contain or batch is None:
                raise
            self.end(batch, error)
        if out_of_memory:  # now that no frame of the failed round is left
            less_memory(self, batch)
        return self.told()

    def told(self) -> list[Event]:
        """What no step has told yet, as where one raised."""
        events, self._events = self._events, []
        return events

    def _leave(self) -> None:
        """Those that were aborted, and those whose deadline passed while they waited."""
        now, (aborted, self._aborted) = clock.now(), (self._aborted, [])
        waiting = self.scheduler.waiting()
        late = [job for job in waiting if job.due is not None and job.due <= now and not job.aborted]
        gone = [job for job in waiting if job.aborted]
        if gone or late:
            self.scheduler.drop(gone + late)
        places = {job.number: (batch, slot) for batch, slot, job in self.scheduler.running() if job.aborted}
        for job in sorted(aborted, key=lambda job: job.number):
            if job.number in places:
                batch, slot = places[job.number]
                if batch.under_way:  # its round is decided first
                    self._aborted.append(job)
                    continue
                self._let_go(batch, slot)
            elif job not in gone:
                continue
            self._fails(job, "aborted", AbortedError(f"request {job.request.id!r} was aborted by its caller"))
        for job in late:
            waited = f"request {job.request.id!r} waited for {now - job.arrived:.3g} s, beyond its deadline"
            self._fails(job, "deadline", DeadlineError(f"{waited}: give it more time, or try again later"))

    def _fill(self) -> None:
        if self._look:
            self._look = False
            for batch in self.scheduler.in_order():
                self._hand_out(batch)
        for job, error in self.scheduler.fill():
            if isinstance(error, torch.OutOfMemoryError):
                if self.micro_batch > 1 or not self.contain:
                    self.scheduler.add(job)
                    raise error
                error = no_memory(self)
            if not self.contain:
                raise error
            self._fails(job, reason_of(error), error)

    def _batch(self, job: Job, alike: int) -> Batch | None:
        most = self.make.batches(job, self.micro_batch)
        if alike >= most:
            return None
        slots = self.make.slots(job, most)
        self.scheduler.make_room(lambda batches: self.make.has_room(batches, job, self.micro_batch, slots))
        return self.new_batch(job, slots, most > 1)

    def new_batch(self, job: Job, slots: int, apart: bool) -> Batch:
        runner = self.make.runner(job, self.micro_batch, slots, apart)
        pacer, now = deadline.Pacer(self.pace), clock.now()
        return Batch(job.kind, runner, [None] * slots, job, apart, pacer=pacer, idle_since=now)

    # ---- after a round ----

    def _after_round(self, batch: Batch, failed: dict[int, FlowfastError]) -> None:
        runner = batch.runner
        self.rounds += 1
        self.rows_seen += runner.rows[0]
        for slot, error in failed.items():
            job = batch.job(slot)
            self._let_go(batch, slot)
            self._fails(job, "reward", error)
        if self.polls:
            runner.report(batch.jobs)
            self.tell(batch)
        self._keep_time(batch)
        self._hand_out(batch)
        if self.splits and self.rows_at(self.rounds) != self.micro_batch:
            resize(self, self.rows_at(self.rounds))

    def tell(self, batch: Batch, all_of_them: bool = False) -> None:
        """Reports that have come, or all, as events."""
        for report in batch.runner.reports(all_of_them):
            used, padded = rows_of(report)
            self.rows_used, self.rows_padded = self.rows_used + used, self.rows_padded + padded
            self._events += events_of(report)

    def _let_go(self, batch: Batch, slot: int) -> None:
        """Frees a slot without a sample."""
        self.tell(batch, all_of_them=True)
        batch.runner.leave(slot)
        batch.clear(slot)

    def _hand_out(self, batch: Batch) -> None:
        """Decodes what is done and frees its slots."""
        done = [slot for slot in batch.taken if batch.runner.done(slot)]
        if not done:
            return
        if self.save:
            self.save()
        for slot in done:
            job = batch.job(slot)
            if job.aborted:
                continue
            try:
                sample, nan = batch.runner.take(slot, job)
            except (FlowfastError, torch.OutOfMemoryError) as error:
                if not self.contain:
                    raise
                memory = no_memory(self, batch.runner.stage)
                batch.runner.stage = ""
                sample, nan = error if isinstance(error, FlowfastError) else memory, 0
            self.tell(batch, all_of_them=True)
            batch.clear(slot)
            self.nan_rewards += nan
            if isinstance(sample, FlowfastError):
                self._fails(job, "model", sample)
                continue
            self._timed -= job.due is not None
            self._events.append(finished(job, sample, batch.runner.micro_batch))

    def _fails(self, job: Job, reason: str, error: FlowfastError) -> None:
        self._timed -= job.due is not None
        self._events.append(Failed(job.request.id, reason, error))

    def end(self, batch: Batch, error: FlowfastError, lost: bool = False) -> None:
        """Nobody knows how a batch stands: all of its requests end, the engine goes on. lost: its runner is gone."""
        if batch in self.under_way:
            self.under_way.remove(batch)
        if not lost:
            batch.runner.drop()
        self.scheduler.remove(batch)
        for slot in batch.taken:
            self._fails(batch.job(slot), reason_of(error), error)

    def _keep_time(self, batch: Batch) -> None:
        """Learns the pace of a batch, and keeps to deadlines."""
        if self._timed:
            batch.runner.keep_pace()
        now, (rows, scored) = clock.now(), batch.runner.rows
        micro_batch = batch.runner.micro_batch
        batch.pacer.tick(now - self.last, rows // micro_batch, scored // micro_batch)
        self.last = now
        if self._timed or self._repeating:
            batch.cut_late(now, self.scheduler.needed)


def slots_of(core: EngineCore, job: Job) -> int:
    """Of all batches of the job's kind together."""
    most = core.make.batches(job, core.micro_batch)
    return most * core.make.slots(job, most)


def finished(job: Job, sample: Sample, micro_batch: int) -> Finished:
    waited = 0.0 if job.moved_in is None else job.moved_in - job.arrived
    return Finished(job.request.id, sample, job.rerun, clock.now() - job.arrived, micro_batch, waited)


def reason_of(error: FlowfastError) -> str:
    """The word for it in `Failed`."""
    return "reward" if isinstance(error, RewardError) else "prompt" if isinstance(error, PromptError) else "model"
