"""Budgets in seconds: what a micro-batch takes, the largest budget in NFE that fits, and what is left on the way."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

import torch

from flowfast.engine import clock
from flowfast.errors import BudgetError
from flowfast.resolve import Resolved

_PACES: MutableMapping[Any, dict[Any, deque[float]]] = WeakKeyDictionary()


def known_pace(flow: Any, key: Any) -> float | None:
    """Seconds of a micro-batch in the last searches of this process that were alike (`key`), if there were any."""
    paces = _PACES.get(flow, {}).get(key)
    return statistics.median(paces) if paces else None


def learn_pace(flow: Any, key: Any, seconds: float) -> None:
    _PACES.setdefault(flow, {}).setdefault(key, deque(maxlen=5)).append(seconds)


def count_batches(widths: list[int], prompts: int, micro_batch: int) -> int:
    """Micro-batches of `prompts` prompts that go in step, each with widths[r] rows in its r-th round."""
    return sum(-(-prompts * width // micro_batch) for width in widths)


def largest_budget(
    resolved: Resolved, seconds: float, pace: float, *, prompts: int, slots: int, micro_batch: int
) -> int:
    """The largest budget, in NFE a prompt, whose rounds fit into `seconds` a prompt where a micro-batch takes `pace`
    seconds. BudgetError where that is too short for the method."""
    waves = [slots] * (prompts // slots) + [prompts % slots]

    def fits(budget: int) -> bool:
        try:
            widths = resolved.plan(budget).widths()
        except BudgetError:  # below what the method needs
            return False
        return sum(count_batches(widths, wave, micro_batch) for wave in waves) * pace <= seconds * prompts

    # Not by halving: more budget may take less time, where it pays for a second chain that fills the batch.
    low = resolved.passes
    high = 2 + 2 * int(seconds / pace * micro_batch) * resolved.passes
    for step in (max(1, high // 64), max(1, high // 2048)):
        low = max([low, *(budget for budget in range(low, min(high, low + 65 * step), step) if fits(budget))])
    try:
        resolved.plan(low)
    except BudgetError as error:
        raise BudgetError(
            f"{seconds:g} s a prompt are too short here, where {micro_batch} rows take {pace:.3g} s: {error}"
        ) from None
    return low


class Deadline:
    """How much time of a budget in seconds is left, and what a micro-batch takes at the pace of the last rounds."""

    def __init__(self, seconds: float, pace: float):
        self.seconds, self.pace, self.round_seconds = seconds, pace, 0.0
        self.recent: deque[tuple[float, int]] = deque(maxlen=8)

    def start(self, begun: float, device: torch.device) -> None:
        self.begun = self.last = begun
        self.events: deque[Any] | None = deque() if device.type == "cuda" else None

    def tick(self, batches: int) -> None:
        """A round of so many micro-batches was sent off. On CUDA at most two rounds are under way, so that the host's
        clock tells what the device has done."""
        if self.events is not None:
            self.events.append(torch.cuda.Event())
            self.events[-1].record()
            if len(self.events) > 2:
                self.events.popleft().synchronize()
        at = clock.now()
        self.recent.append((at - self.last, batches))
        self.last = at
        self.pace = sum(seconds for seconds, _ in self.recent) / sum(count for _, count in self.recent)
        self.round_seconds = self.pace * batches

    def restart(self) -> None:
        """Micro-batches have another size from here on: the pace is that of the rounds to come."""
        self.recent.clear()
        self.last = clock.now()

    def left(self) -> float:
        return self.begun + self.seconds - self.last

    def share(self, batches: float) -> float:
        """The share of so many micro-batches, those still planned, that leaves the search no more than a round late:
        1 where all of them do."""
        over = batches * self.pace - self.left()
        if not batches or over <= self.round_seconds:
            return 1.0
        return max(0.0, 1 - over / (batches * self.pace))
