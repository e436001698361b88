"""Budgets in seconds: what a micro-batch takes, the largest budget in NFE that fits, and what is left on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from flowfast.engine import clock
from flowfast.errors import BudgetError
from flowfast.resolve import Resolved


class Pace(NamedTuple):
    """What a micro-batch takes. *Work* counts them, one that is decoded and scored as 1 + scoring."""

    seconds: float
    """Of one that nobody scores."""
    scoring: float
    """What decoding and scoring one takes on top, as a share of that; 0 where all are scored: then `seconds` has it."""

    def work(self, widths: list[int], scored: list[int], prompts: int, micro_batch: int) -> float:
        """Of `prompts` prompts in step, each with widths[r] rows in its r-th round, scored[r] of them scored."""
        model = sum(-(-prompts * width // micro_batch) for width in widths)
        return model + self.scoring * sum(-(-prompts * width // micro_batch) for width in scored)


_PACES: MutableMapping[Any, dict[Any, deque[Pace]]] = WeakKeyDictionary()


def known_pace(flow: Any, key: Any) -> Pace | None:
    """The median of the last searches of this process that were alike (`key`), if there were any."""
    paces = _PACES.get(flow, {}).get(key)
    return sorted(paces)[len(paces) // 2] if paces else None


def learn_pace(flow: Any, key: Any, pace: Pace) -> None:
    _PACES.setdefault(flow, {}).setdefault(key, deque(maxlen=5)).append(pace)


def largest_budget(
    resolved: Resolved, seconds: float, pace: Pace, *, prompts: int, slots: int, micro_batch: int
) -> int:
    """The largest budget, in NFE a prompt, whose rounds fit into `seconds` a prompt at this pace. BudgetError where
    that is too short for the method."""
    waves = [slots] * (prompts // slots) + [prompts % slots]

    def fits(budget: int) -> bool:
        try:
            forecast = resolved.plan(budget).forecast()
        except BudgetError:  # below what the method needs
            return False
        work = sum(pace.work(forecast.widths, forecast.scored, wave, micro_batch) for wave in waves)
        return work * pace.seconds <= seconds * prompts

    # Not by halving: more budget may take less time, where it pays for a second chain that fills the batch.
    low = resolved.passes
    high = 2 + 2 * int(seconds / pace.seconds * micro_batch) * resolved.passes
    for step in (max(1, high // 64), max(1, high // 2048)):
        low = max([low, *(budget for budget in range(low, min(high, low + 65 * step), step) if fits(budget))])
    try:
        resolved.plan(low)
    except BudgetError as error:
        raise BudgetError(
            f"{seconds:g} s a prompt are too short here, where {micro_batch} rows take {pace.seconds:.3g} s: {error}"
        ) from None
    return low


class Deadline:
    """How much time of a budget in seconds is left, and what a micro-batch takes at the pace of the last rounds."""

    def __init__(self, seconds: float, pace: Pace):
        self.seconds, self.pace, self.round_seconds, self.worked = seconds, pace, 0.0, 0.0
        self.recent: deque[tuple[float, float]] = deque(maxlen=8)

    def start(self, begun: float, device: torch.device) -> None:
        self.begun = self.last = begun
        self.events: deque[Any] | None = deque() if device.type == "cuda" else None

    def tick(self, work: float) -> None:
        """A round of so much work was sent off. On CUDA at most two rounds are under way, so that the host's
        clock tells what the device has done."""
        if self.events is not None:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.popleft().synchronize()
        at = clock.now()
        self.recent.append((at - self.last, work))
        self.last = at
        self.worked += work
        taken = sum(seconds for seconds, _ in self.recent) / sum(count for _, count in self.recent)
        self.pace = self.pace._replace(seconds=taken)
        self.round_seconds = taken * work

    def restart(self) -> None:
        """Micro-batches have another size from here on: the pace is that of the rounds to come."""
        self.recent.clear()
        self.last = clock.now()

    def left(self) -> float:
        return self.begun + self.seconds - self.last

    def share(self, work: float) -> float:
        """The share of so much work, which is still planned, that leaves the search no more than a round late: 1 where
        all of it does."""
        over = work * self.pace.seconds - self.left()
        if not work or over <= self.round_seconds:
            return 1.0
        return max(0.0, 1 - over / (work * self.pace.seconds))
