"""The plan of a search: a quota of candidates for each transition, whether the first better child is taken early, and
after which transitions chains are regrouped."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from flowfast.bounds import MOST_ROWS
from flowfast.errors import BudgetError
from flowfast.methods.forecast import Forecast, Planned, forecast


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The numbers of one search: they follow from the budget before the first model call."""

    chains: int
    lanes: int
    """Most candidates a chain evaluates in one round."""
    quota: list[list[int]]
    """(chains, transitions): candidates at each transition."""
    left: list[int]
    """(chains,): NFE that a chain may spend in all."""
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
    ends: bool = False
    """Does a regrouping end chains? Those that go on stand in the first places: where a chain has quota 0 there is
    none."""
    groups: int = 1
    """How many groups of chains a regrouping method keeps (CoDe's and search-over-paths' N)."""
    finished: list[bool] = field(default_factory=list)
    """(transitions,): overrides the schedule's rule of which x0_hat is a finished sample; empty: the schedule's."""

    scored: list[bool] = field(default_factory=list)
    """(transitions,): where a decision reads the score of a child; empty: everywhere. No other is decoded or scored."""

    passes: list[int] = field(default_factory=list)
    """(transitions,): NFE of an evaluation; empty: 1."""
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

    def fits(self, largest: "Plan") -> bool:
        """Does a batch made for the largest plan do with this one exactly what one of its own would?

        Not where chains are regrouped and there are fewer of them: which ones go on depends on their number.
        """
        names = ("accept", "margin", "carry", "regroup", "ends", "groups", "finished", "scored", "passes")
        alike = all(getattr(self, name) == getattr(largest, name) for name in names)
        chains = self.chains == largest.chains or (self.chains < largest.chains and (self.ends or not self.regroup))
        lanes = self.lanes == largest.lanes or max(map(max, self.quota)) <= self.lanes <= largest.lanes
        return alike and chains and lanes

    def widths(self) -> list[int]:
        """Live lanes of each round, at most: exact without early acceptance, an upper bound with it."""
        return self.forecast().widths

    def forecast(self, cuts: Sequence[tuple[int, int]] = ()) -> Forecast:
        """What the host knows of a search without asking the device.

        cuts: (round, NFE): from that round on all chains together spend at most so much, or what one of them needs to
        finish, in the order of rounds.
        """
        return forecast(self.planned(), [at for at, _ in cuts], [nfe for _, nfe in cuts])

    def planned(self) -> Planned:
        """What a forecast reads of it."""
        T = len(self.accept)
        return Planned(
            self.lanes,
            self.quota,
            self.left,
            self.start or [True] * self.chains,
            any(self.accept),
            self.regroup or [False] * T,
            self.scored or [True] * T,
            self.passes or [1] * T,
            self.keep or list(range(self.chains)),
        )


def need(name: str, budget: int, least: int) -> None:
    """Raises BudgetError when the budget, in NFE, is below what the method needs."""
    if budget < least:
        raise BudgetError(
            f"method {name!r} needs at least {least} NFE a prompt, but the budget allows {budget} (an evaluation costs "
            "2 NFE with two-pass guidance): raise the budget or lower --steps"
        )


def cost(counts: Sequence[int], passes: Sequence[int]) -> int:
    """NFE of so many evaluations at each transition."""
    return sum(count * each for count, each in zip(counts, passes, strict=True))


def count_of(option: int | None, wanted: int, most: int, what: str) -> int:
    """A number of chains or candidates: the caller's if it fits the budget, else the method's wish cut to the
    budget."""
    if option is None:
        return max(1, min(wanted, most))
    if not 1 <= option <= most:
        raise BudgetError(f"{what} must lie in 1..{most} at this budget, got {option}: change it or raise the budget")
    return option


def spread(nfe: int, weights: list[float], passes: list[int]) -> list[int]:
    """The candidates that `nfe` pays for, in proportion to weights, largest remainders first, ties to the earlier."""
    scale = sum(weights)
    if scale <= 0 or nfe <= 0:
        return [0] * len(weights)

    def shares(total: int) -> list[int]:
        exact = [total * w / scale for w in weights]
        share = [int(e) for e in exact]
        for i in sorted(range(len(weights)), key=lambda i: (share[i] - exact[i], i))[: total - sum(share)]:
            share[i] += 1
        return share

    low, high = nfe // max(passes), nfe // min(passes)
    while low < high:  # the most that is paid for; where passes are all alike both ends are
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost(shares(middle), passes) <= nfe else (low, middle - 1)
    return shares(low)


def split(nfe: int, chains: int, unit: int) -> list[int]:
    """NFE of each chain, in whole units; the first ones take the remainder."""
    units = nfe // unit
    return [(units // chains + (c < units % chains)) * unit for c in range(chains)]
