"""Whether a request with a deadline may come in: nobody who was taken on before may be late because of it."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Hashable

from flowfast.engine.deadline import Pacer
from flowfast.engine.request import Job
from flowfast.engine.scheduler import Batch, Scheduler
from flowfast.errors import DeadlineError


def too_late(scheduler: Scheduler, newcomer: Job, slots: Callable[[Job], int], now: float) -> DeadlineError | None:
    """Why the newcomer may not come in: it, or one that was taken on, would miss its deadline though each with a
    deadline got the least that it needs. None: it may, as always while no round has told a pace. slots(job): of the
    job's kind."""
    pacer = known_pacer(scheduler.batches, newcomer.kind)
    if pacer is None:
        return None
    waiting = sorted(scheduler.waiting(), key=lambda job: (job.place, job.number))
    with_it = sorted([*waiting, newcomer], key=lambda job: (job.place, job.number))
    turn = pacer.seconds(micro_batches(scheduler, with_it, slots))
    before = late(ends(scheduler, waiting, slots, now, turn))
    after = ends(scheduler, with_it, slots, now, turn)
    if not late(after) - before:
        return None
    end = next(end for job, end in after if job is newcomer)
    return refusal(newcomer, end - newcomer.arrived, newcomer.number in late(after))


def refusal(job: Job, seconds: float, itself: bool) -> DeadlineError:
    """seconds: that it would take at least; itself: more than it may, else another one would be late."""
    seconds = rounded_up(seconds)
    name, given, needed = job.request.id, f"{job.request.deadline:g} s", f"{seconds:g} s"
    if itself:
        why = f"cannot end within its {given} beside those that were taken on before: it takes {needed} at least"
        return DeadlineError(f"request {name!r} {why}; give it as much, or try later", seconds)
    why = f"would take {needed} of its {given}, but one that was taken on before would miss its own deadline"
    return DeadlineError(f"request {name!r} {why}: try later, or without a deadline", seconds)


def rounded_up(seconds: float) -> float:
    """To three digits."""
    digits = 2 - math.floor(math.log10(max(seconds, 1e-6)))
    return math.ceil(seconds * 10**digits) / 10**digits


Ends = list[tuple[Job, float]]


def late(ends: Ends) -> set[int]:
    """Numbers of those that would end late."""
    return {job.number for job, end in ends if job.due is not None and end > job.due}


def ends(scheduler: Scheduler, waiting: list[Job], slots: Callable[[Job], int], now: float, turn: float) -> Ends:
    """When each would end. turn: seconds of a round of every batch; slots run side by side."""
    found: Ends = []
    free: dict[Hashable, list[float]] = {}
    for batch, slot, job in scheduler.running():
        end = now + turn * len(least(job, batch.runner.rounds[slot]))
        heapq.heappush(free.setdefault(job.kind, []), end)
        found.append((job, end))
    for job in waiting:
        busy = free.setdefault(job.kind, [])
        begin = now if len(busy) < slots(job) else heapq.heappop(busy)
        end = begin + turn * len(least(job, 0))
        heapq.heappush(busy, end)
        found.append((job, end))
    return found


def least(job: Job, at: int) -> list[int]:
    """Lanes of the rounds that a request which has run `at` rounds still takes: as planned, or with a deadline the
    least."""
    forecast = job.forecast if job.due is None else job.plan.forecast([*job.cuts, (at, 0)])
    return forecast.widths[at:]


def micro_batches(scheduler: Scheduler, waiting: list[Job], slots: Callable[[Job], int]) -> float:
    """Of a round of every kind, for these take turns, with all slots taken that the waiting ones could take."""
    rows: dict[Hashable, list[float]] = {}
    for batch, slot, job in scheduler.running():
        widths = least(job, batch.runner.rounds[slot])
        rows.setdefault(job.kind, []).append(sum(widths) / max(1, len(widths)))
    for job in waiting:
        of_kind = rows.setdefault(job.kind, [])
        if len(of_kind) < slots(job):
            widths = least(job, 0)
            of_kind.append(sum(widths) / max(1, len(widths)))
    sizes = {batch.kind: batch.runner.micro_batch for batch in scheduler.batches}
    usual = next(iter(sizes.values()), 1)
    return float(sum(math.ceil(sum(of_kind) / sizes.get(kind, usual)) for kind, of_kind in rows.items()))


def known_pacer(batches: list[Batch], kind: Hashable) -> Pacer | None:
    """That of the kind, else of any: it is the same model."""
    known = [batch for batch in batches if batch.pacer.pace is not None]
    return next((batch.pacer for batch in known if batch.kind == kind), known[0].pacer if known else None)
