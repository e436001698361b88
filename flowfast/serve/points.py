"""The candidates of a search as its events tell them: what was tried, and what became of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

from flowfast.types import Candidate

MOST_POINTS = 20_000
"""Of one request; later candidates are not told."""
LETTERS = 160
"""Of a point in JSON, about."""
STATUS = {"": "dropped", "discarded": "dropped", "ended": "dropped", "best": "kept", "accepted": "accepted"}


class Points:
    """Of one request with several searches: those that were not told yet."""

    def __init__(self) -> None:
        self.count = 0
        self._waiting: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
        self._best: defaultdict[int, float] = defaultdict(lambda: -math.inf)
        self._spent: defaultdict[int, int] = defaultdict(int)

    def add(self, index: int, nfe: int, candidates: Sequence[Candidate]) -> None:
        """What a round of search number index has evaluated; nfe: spent after it. Those of one round came together:
        their NFE are spread evenly over it."""
        before, self._spent[index] = self._spent[index], nfe
        for place, each in enumerate(candidates[: MOST_POINTS - self.count], start=1):
            reward = each.reward if each.reward is not None and math.isfinite(each.reward) else None
            status = STATUS[each.status]
            if each.finished and reward is not None and reward > self._best[index]:
                self._best[index], status = reward, "best"
            self._waiting[index].append({
                "nfe": before + (nfe - before) * place // len(candidates), "reward": reward, "status": status,
                "finished": each.finished, "chain": each.chain, "transition": each.transition,
                "candidate": each.candidate,
            })  # fmt: skip
            self.count += 1

    def restart(self, index: int) -> None:
        """Search number index begins anew."""
        for known in (self._waiting, self._best, self._spent):
            known.pop(index, None)

    def waiting(self, index: int) -> bool:
        return bool(self._waiting[index])

    def take(self, index: int) -> list[dict[str, Any]]:
        """In the order in which they were tried."""
        return self._waiting.pop(index, [])
