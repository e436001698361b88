"""Deadlines and budgets in seconds: what a micro-batch takes, the largest budget in NFE that fits, what is left on the
way. Numbers only: who runs what stands in core.py."""

from __future__ import annotations

from collections import deque
from collections.abc import MutableMapping
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from flowfast.errors import BudgetError
from flowfast.resolve import Resolved


class Rest(NamedTuple):
    """Rows of rounds: lanes, those of them that need the null condition, those that are scored."""

    widths: list[int]
    null: list[int]
    scored: list[int]

    @property
    def nfe(self) -> int:
        return sum(self.widths) + sum(self.null)


class Pace(NamedTuple):
    """What a micro-batch takes. *Work* counts model calls, one whose rows are decoded and scored as 1 + scoring."""

    seconds: float
    """Of one that nobody scores."""
    scoring: float
    """What decoding and scoring one takes on top, as a share of that; 0 where all are scored: then `seconds` has it."""

    def work(self, rest: Rest, prompts: int, micro_batch: int) -> float:
        """Of `prompts` prompts in step, each with so many rows in its rounds."""
        calls, null, scored = (sum(-(-prompts * width // micro_batch) for width in widths) for widths in rest)
        return calls + null + self.scoring * scored


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
        rest = Rest(forecast.widths, forecast.null, forecast.scored)
        work = sum(pace.work(rest, wave, micro_batch) for wave in waves)
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


class Pacer:
    """What a micro-batch of one batch takes at the pace of its last rounds."""

    def __init__(self, pace: Pace | None = None):
        """pace None: the first round will tell."""
        self._pace, self._last, self.worked, self._fresh = pace, 0.0, 0.0, True
        self._recent: deque[tuple[float, float]] = deque(maxlen=8)

    @property
    def pace(self) -> Pace | None:
        """None: no round has told it yet."""
        if not self._fresh and self._recent:
            taken = sum(seconds for seconds, _ in self._recent) / sum(count for _, count in self._recent)
            self._pace = (self._pace or UNKNOWN)._replace(seconds=taken)
            self._fresh = True
        return self._pace

    @property
    def round_seconds(self) -> float:
        """Of a round like the last one."""
        return self.seconds(self._last)

    def work(self, rest: Rest, prompts: int, micro_batch: int) -> float:
        """`Pace.work`, by what is known of scoring."""
        return (self._pace or UNKNOWN).work(rest, prompts, micro_batch)

    def tick(self, seconds: float, micro_batches: int, scored: int) -> None:
        """A round of so many micro-batches, so many of them scored, took so long, with all that went with it."""
        work = self._last = micro_batches + (self._pace or UNKNOWN).scoring * scored
        if work:
            self._recent.append((seconds, work))
            self.worked += work
            self._fresh = False

    def seconds(self, work: float) -> float:
        """What so much work takes; 0 as long as nobody knows."""
        return 0.0 if self.pace is None else work * self.pace.seconds

    def restart(self) -> None:
        """Micro-batches have another size from here on: the pace is that of the rounds to come."""
        self._recent.clear()


UNKNOWN = Pace(0.0, 0.0)


def share(needed: float, left: float, round_seconds: float) -> float:
    """The share of the planned rest, which needs so many seconds, that ends no more than a round late: 1 where all of
    it does."""
    over = needed - left
    if not needed or over <= round_seconds:
        return 1.0
    return max(0.0, 1 - over / needed)
