"""Which plan a budget takes, by what a bank shows of each.

Plans are best-of-n, and prune with one or two cuts where the reward sees something, on each path of the bank. Their
numbers are those of the methods themselves (`Resolved.plan`), so all cost at most the same. The bank is small, and the
best of a hundred plans on it is best partly by luck; so the plainest plan wins that is within one standard error of the
best (of their difference, over prompts): first prune's own default on the model's own path, then that on another one,
then fewer cuts. What the bank promises of the plan that is taken is a little too much all the same: on public rewards
of FLUX.1-dev .15 to .2 standard deviations over best-of-n where 176 other prompts gave .07 to .12.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from flowfast.calibration.bank import BLIND, BankPath
from flowfast.calibration.replay import drawn, replay
from flowfast.errors import BudgetError, OptionError
from flowfast.methods.base import Method
from flowfast.methods.bon import BestOfN
from flowfast.methods.plan import Plan
from flowfast.methods.prune import Prune
from flowfast.resolve import Resolved
from flowfast.types import WALK_OPTIONS

SHARES = (0.5, 0.35, 0.25, 0.15, 0.1)
"""Of the scouts that go on after a cut."""
SEEN = (BLIND, 0.4, 0.55, 0.7, 0.8, 0.9)
"""Rank correlations: a cut is tried where the reward first has one of them."""
R20 = (1, 1.12, 1.25, 1.4, 1.6, 1.8, 2, 2.24, 2.5, 2.8, 3.15, 3.55, 4, 4.5, 5, 5.6, 6.3, 7.1, 8, 9)
EACH = 200
LADDER = [
    *range(1, EACH),
    *(round(step * 10**power) for power in range(2, 8) for step in R20 if step * 10**power >= EACH),
]
"""Budgets in NFE for which plans are chosen: each one while one scout more is a large part of it, then preferred
numbers (ISO 3). One in between takes the plan of the last one below it, so that requests of nearly the same budget
share a batch."""


@dataclass(frozen=True)
class Route:
    """A path that a search may take, as the bank has it and as the model walks it."""

    bank: BankPath
    resolved: Resolved


@dataclass(frozen=True, eq=False)
class Choice:
    """A plan, and what the bank shows of it."""

    route: int
    method: Method
    counts: tuple[int, ...]
    """(T,): chains that are alive at each transition."""
    nfe: int
    rewards: np.ndarray
    """(P,): the expected final reward of each prompt of the bank."""

    @property
    def mean(self) -> float:
        return float(self.rewards.mean())

    @property
    def cuts(self) -> int:
        """Where chains end."""
        return sum(a > b for a, b in zip(self.counts, self.counts[1:], strict=False))


@dataclass(frozen=True)
class Chosen:
    """What a budget takes, and why."""

    budget: int
    taken: Choice
    best: Choice
    choices: tuple[Choice, ...]
    """All that were looked at, the best first."""
    why: str


def rung(budget: int) -> int:
    """The budget of the ladder whose plan it takes."""
    return LADDER[bisect_right(LADDER, budget) - 1]


def alive(plan: Plan) -> tuple[int, ...]:
    """Chains at each transition."""
    return tuple(sum(of_chain[at] > 0 for of_chain in plan.quota) for at in range(len(plan.accept)))


def choose(routes: Sequence[Route], budget: int, seed: int = 0) -> Chosen:
    """The plan of a budget in NFE. Raises BudgetError where no route has room for one chain."""
    plans = [plans_of(route, budget) for route in routes]
    if not any(plans):
        least = min(route.bank.nfe for route in routes)
        raise BudgetError(f"one trajectory costs {least} NFE, but the budget is {budget}: raise it")
    most = max(counts[0] for of_route in plans for counts in of_route)
    found: list[Choice] = []
    for number, (route, of_route) in enumerate(zip(routes, plans, strict=True)):
        trajectories = drawn(route.bank.rewards, most, seed)  # the same draws on all routes
        for counts, method in of_route.items():
            nfe = sum(n * passes for n, passes in zip(counts, route.bank.passes, strict=True))
            found.append(Choice(number, method, counts, nfe, replay(trajectories, counts)))
    best = max(found, key=lambda choice: choice.mean)
    near = [choice for choice in found if best.mean - choice.mean <= standard_error(best, choice)]
    taken = min(near, key=lambda choice: (not is_default(choice), choice.route, choice.cuts, -choice.mean))
    ranked = tuple(sorted(found, key=lambda choice: -choice.mean))
    return Chosen(budget, taken, best, ranked, reason(taken, best, routes))


def plans_of(route: Route, budget: int) -> dict[tuple[int, ...], Method]:
    """Methods by the chains that they keep alive; of those that do the same the plainest."""
    found: dict[tuple[int, ...], Method] = {}
    for method in methods_of(route.bank):
        try:
            plan = replace(route.resolved, method=method).plan(budget)
        except BudgetError:  # or fewer chains than were asked for
            continue
        found.setdefault(alive(plan), method)
    return found


def methods_of(bank: BankPath) -> list[Method]:
    """Best-of-n, prune's default, and prune with one and two cuts, where the reward sees."""
    if not bank.sees:
        return [BestOfN()]
    first_to = [next((at for at in bank.sees if bank.rho[at] >= seen), None) for seen in SEEN]
    times = {at: math.ceil(bank.linear_times[at] * 1e4) / 1e4 for at in first_to if at is not None}  # not one too late
    found: list[Method] = [BestOfN(), Prune()]
    found += [Prune(at=(time,), keep=(share,)) for time in times.values() for share in SHARES]
    return found + [
        Prune(at=(times[first], times[second]), keep=(share, less))
        for first in times
        for second in times
        if second > first
        for share in SHARES
        for less in SHARES
        if less < share
    ]


def standard_error(one: Choice, other: Choice) -> float:
    """Of the mean of their difference, over prompts."""
    difference = one.rewards - other.rewards
    return float(difference.std(ddof=1) / len(difference) ** 0.5) if len(difference) > 1 else 0.0


def is_default(choice: Choice) -> bool:
    return choice.method == Prune()


def reason(taken: Choice, best: Choice, routes: Sequence[Route]) -> str:
    """Why it was taken, in words."""
    if not routes[taken.route].bank.sees:
        return f"the reward is blind on this path (rank correlation below {BLIND:g} before the end), so nothing is cut"
    if taken is best:
        return "the best plan on the calibration"
    gap = f"{best.mean - taken.mean:.3g} below the best, within one standard error ({standard_error(best, taken):.2g})"
    kind = "prune's default" if is_default(taken) else "fewer cuts" if taken.cuts < best.cuts else "the nearer path"
    return f"{kind}, {gap} on the calibration"


def matching(bank: BankPath, resolved: Resolved) -> bool:
    """Does a search go this path?"""
    if len(bank.linear_times) != resolved.schedule.transitions or list(bank.passes) != passes_of(resolved):
        return False
    times = np.abs(np.array(bank.linear_times) - resolved.schedule.linear_time.numpy()).max()
    return bool(times < 1e-5) and is_plain(resolved) and options_of(resolved) == bank.options


def options_of(resolved: Resolved) -> dict[str, object]:
    """All of WALK_OPTIONS, filled in, as JSON has them."""
    found = {name: getattr(resolved.params, name) for name in WALK_OPTIONS}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in found.items()}


def passes_of(resolved: Resolved) -> list[int]:
    """NFE of each transition."""
    return list(resolved.schedule.passes.tolist())


def is_plain(resolved: Resolved) -> bool:
    """Is it the model's ODE alone, without noise and gradient?"""
    return resolved.params.gradient is None and not bool(resolved.schedule.searchable[1:].any())


def check_plain(resolved: Resolved) -> None:
    """Raises OptionError for a path that adds noise, which no bank has."""
    if not is_plain(resolved):
        raise OptionError(
            "a calibration is made on the model's plain ODE, but this path adds noise or follows a gradient: leave "
            "--diffusion, --preset and dps out"
        )
