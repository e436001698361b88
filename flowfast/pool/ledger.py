"""Who gets the next wave of a shared budget. Pure: no model, no clock, no order of arrival."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 8
"""Most prompts of a wave, and a quarter of them at most: who is in the next one is decided by what this one found."""
MOST_SHARES = 6
"""A prompt spends at most so many times its share."""


@dataclass
class Ledger:
    """Rollover budget forcing rolls unused budget over between timesteps (Kim et al. 2025, arXiv 2503.19385); this
    rolls it over between prompts.

    Every prompt gets one wave; then waves go to those with the largest (ceiling - best reward) / (waves + 1), ties to
    the smaller key, up to eight at a time, until nothing more can be paid. What a wave costs is the same for all,
    whatever it leaves unspent.

    Args:
        keys: of the prompts, all different; the order in which prompts are given does not matter beside them.
        share: budget of one prompt, in NFE; all together have share x prompts.
        wave: what one wave costs at most.
        ceiling: the reward's.
        until: a prompt whose best reward reaches it gets no more.
    """

    keys: Sequence[int]
    share: int
    wave: int
    ceiling: float
    until: float = math.inf
    shares: int | None = None
    """Prompts whose budget is in it, where some of them are equal; default: as many as there are keys."""
    waves: list[int] = field(init=False)
    """That each prompt has had."""
    best: list[float] = field(init=False)
    lost: list[bool] = field(init=False)
    """Prompts whose wave found nothing: they get no more."""
    left: int = field(init=False)

    def __post_init__(self) -> None:
        count = len(self.keys)
        self.waves, self.best, self.lost = [0] * count, [-math.inf] * count, [False] * count
        self.left = self.share * (count if self.shares is None else self.shares)
        self.width = max(1, min(WIDTH, count // 4))
        self.order = sorted(range(count), key=lambda at: self.keys[at])

    def next(self) -> list[int]:
        """The prompts of the next wave, paid for; [] at the end."""
        if not any(self.waves):
            chosen = self.order
        else:
            able = [at for at in self.order if self.may_have_more(at)]
            chosen = sorted(able, key=lambda at: -self.gap(at))[: self.width]  # stable: ties to the smaller key
        chosen = chosen[: self.left // self.wave]
        for at in chosen:
            self.waves[at] += 1
        self.left -= self.wave * len(chosen)
        return chosen

    def gap(self, at: int) -> float:
        """What one more wave might bring."""
        return (self.ceiling - self.best[at]) / (self.waves[at] + 1)

    def heard(self, at: int, reward: float | None) -> None:
        """What a wave of a prompt found; None: nothing."""
        if reward is None:
            self.lost[at] = True
        else:
            self.best[at] = max(self.best[at], reward)

    def may_have_more(self, at: int) -> bool:
        """Not where it has its ceiling, six times its share, or found nothing."""
        within = (self.waves[at] + 1) * self.wave <= MOST_SHARES * self.share
        return within and not self.lost[at] and self.best[at] < min(self.until, self.ceiling)
