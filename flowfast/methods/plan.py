"""The plan of a search: a quota of candidates for each transition, whether the first better child is taken early, and
after which transitions chains are regrouped."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from flowfast.bounds import MOST_ROWS
from flowfast.errors import BudgetError


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of one search: they follow from the budget before the first model call."""

    chains: int
    lanes: int
    """Most candidates a chain evaluates in one round."""
    quota: list[list[int]]
    """(chains, transitions): candidates at each transition."""
    left: list[int]
    """(chains,): evaluations that a chain may spend in all."""
    accept: list[bool]
    """(transitions,): is the first child better than the best reward so far taken at once?"""
    margin: float = 0.0
    """By how much must a child beat the best reward so far to be taken at once?"""
    carry: bool = False
    """Does an unused quota roll over to the next transition?"""
    start: list[bool] = field(default_factory=list)
    """(chains,): which chains run from the beginning; empty: all."""
    regroup: list[bool] = field(default_factory=list)
    """(transitions,): after which transitions chains are regrouped; empty: never."""
    groups: int = 1
    """How many groups of chains a regrouping method keeps (CoDe's and search-over-paths' N)."""
    finished: list[bool] = field(default_factory=list)
    """(transitions,): overrides the schedule's rule of which x0_hat is a finished sample; empty: the schedule's."""

    scored: list[bool] = field(default_factory=list)
    """(transitions,): where a decision reads the score of a child; empty: everywhere. No other is decoded or scored."""

    keep: list[int] = field(default_factory=list)
    """Chains in the order in which they are kept when time runs short; empty: as they stand."""

    def __post_init__(self) -> None:
        if self.chains > MOST_ROWS:
            raise BudgetError(
                f"this budget would make {self.chains:,} chains of a prompt, at most {MOST_ROWS:,} run: lower it, or "
                "take a method that spends it on fewer chains"
            )

    def read(self, finished: list[bool]) -> list[bool]:
        """(transitions,): where a decision reads a child's score: at a finished sample, before a regrouping, and where
        children of one parent compete. Where better children are taken early: everywhere, for then nobody knows
        before a round where its children will stand."""
        if any(self.accept):
            return [True] * len(self.accept)
        compete = [max(of_chain[at] for of_chain in self.quota) > 1 for at in range(len(finished))]
        regroup = self.regroup or [False] * len(finished)
        return [any(each) for each in zip(self.finished or finished, compete, regroup, strict=True)]

    def widths(self) -> list[int]:
        """Live lanes of each round, at most: exact without early acceptance, an upper bound with it."""
        return self.forecast().widths

    def forecast(self, cuts: Sequence[tuple[int, int]] = ()) -> "Forecast":
        """What the host knows of a search without asking the device.

        cuts: (round, evaluations): from that round on all chains together spend at most so many evaluations, or what
        one of them needs to finish, in the order of rounds.
        """
        return self._greedy(cuts) if any(self.accept) else self._in_step(cuts)

    def _in_step(self, cuts: Sequence[tuple[int, int]]) -> "Forecast":
        T, widths, table = len(self.accept), list[int](), [list(q) for q in self.quota]
        scored, read = list[int](), self.scored or [True] * T
        starts = self.start or [True] * self.chains
        transition = [0 if runs else T for runs in starts]
        quota, left = [q[0] for q in self.quota], list(self.left)
        stopped, allowed = [False] * self.chains, list(left)
        while True:
            for _, evaluations in (cut for cut in cuts if cut[0] == len(widths)):
                need = [min(left[c], T - transition[c] if transition[c] < T else left[c]) for c in range(self.chains)]
                table, left = self._cut(table, left, need, evaluations)
                stopped, allowed = [amount == 0 for amount in left], list(left)
            quota = [min(quota[c], left[c] - (T - 1 - transition[c])) for c in range(self.chains)]  # as the loop does
            on = [transition[c] < T and not stopped[c] for c in range(self.chains)]
            lanes = [min(self.lanes, quota[c]) if on[c] else 0 for c in range(self.chains)]
            if not any(lanes):
                return Forecast(widths, scored, table, allowed)
            widths.append(sum(lanes))
            scored.append(sum(lanes[c] for c in range(self.chains) if transition[c] < T and read[transition[c]]))
            for c in range(self.chains):
                quota[c] -= lanes[c]
                left[c] -= lanes[c]
                if on[c] and quota[c] == 0:
                    transition[c] += 1
                    quota[c] = table[c][transition[c]] if transition[c] < T else 0
            taken = max((r for c, r in enumerate(transition) if r < T and not stopped[c]), default=0) - 1
            if self.regroup and taken >= 0 and self.regroup[taken]:
                # Chains of such a method go in step: late starters join here.
                transition = [taken + 1] * self.chains
                quota = [table[c][taken + 1] for c in range(self.chains)]

    def _greedy(self, cuts: Sequence[tuple[int, int]]) -> "Forecast":
        """Early acceptance: a live chain spends at least one evaluation a round."""
        widths, table, left = list[int](), self.quota, list(self.left)
        for at, evaluations in cuts:
            rounds = at - len(widths)
            widths += self._rounds(left, not widths)[:rounds]
            left = [max(0, amount - rounds) for amount in left]
            table, left = self._cut(table, left, [min(amount, len(self.accept)) for amount in left], evaluations)
        widths += self._rounds(left, not widths)
        return Forecast(widths, widths, table, left)

    def _rounds(self, left: list[int], first: bool) -> list[int]:
        """Widths of all rounds in which chains may spend `left`: fewer than `lanes` once a transition at most."""
        T, K = len(self.accept), self.lanes
        widths = [sum(min(K, amount) for amount in left)] if any(left) else []
        widths *= max(left) if K == 1 else max(T + amount // K for amount in left)
        return [sum(min(K, q[0]) for q in self.quota), *widths[1:]] if first else widths

    def _cut(
        self, table: list[list[int]], left: list[int], need: list[int], evaluations: int
    ) -> tuple[list[list[int]], list[int]]:
        """Quota and left of the chains within `evaluations`: smaller quotas, or fewer chains where quotas are 1."""
        total = sum(left)
        if total == 0:
            return table, left
        if max(max(q) for q in table) > 1:
            share = [max(n, amount * evaluations // total) for n, amount in zip(need, left, strict=True)]
            scaled = [[q and max(1, q * evaluations // total) for q in of_chain] for of_chain in table]
            return scaled, [min(amount, s) for amount, s in zip(left, share, strict=True)]
        kept, spent = [0] * self.chains, 0
        for c in self.keep or range(self.chains):
            if left[c] > 0 and (spent == 0 or spent + need[c] <= evaluations):
                kept[c], spent = left[c], spent + need[c]
        return table, kept


class Forecast(NamedTuple):
    """Live lanes of each round, at most, and those of them whose score is read; the quota (chains, transitions) and
    left (chains,) after the last cut."""

    widths: list[int]
    scored: list[int]
    quota: list[list[int]]
    left: list[int]


def need(name: str, evaluations: int, least: int) -> None:
    """Raises BudgetError when the budget is below what the method needs."""
    if evaluations < least:
        raise BudgetError(
            f"method {name!r} needs at least {least} model evaluations a prompt, but the budget allows {evaluations} "
            "(an evaluation costs 2 NFE with two-pass guidance): raise the budget or lower --steps"
        )


def count_of(option: int | None, wanted: int, most: int, what: str) -> int:
    """A number of chains or candidates: the caller's if it fits the budget, else the method's wish cut to the
    budget."""
    if option is None:
        return max(1, min(wanted, most))
    if not 1 <= option <= most:
        raise BudgetError(f"{what} must lie in 1..{most} at this budget, got {option}: change it or raise the budget")
    return option


def spread(total: int, weights: list[float]) -> list[int]:
    """`total` whole candidates spread in proportion to weights, largest remainders first, ties to the earlier."""
    scale = sum(weights)
    if scale <= 0:
        return [0] * len(weights)
    exact = [total * w / scale for w in weights]
    share = [int(e) for e in exact]
    for i in sorted(range(len(weights)), key=lambda i: (share[i] - exact[i], i))[: total - sum(share)]:
        share[i] += 1
    return share


def split(evaluations: int, chains: int) -> list[int]:
    """Evaluations of each chain; the first ones take the remainder."""
    return [evaluations // chains + (c < evaluations % chains) for c in range(chains)]
