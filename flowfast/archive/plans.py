"""The plans of an archive: for each budget up to the largest one, the plan that Python would make of it."""

from __future__ import annotations

from itertools import groupby
from typing import NamedTuple

from flowfast.errors import FlowfastError
from flowfast.methods.plan import Plan
from flowfast.resolve import Resolved


class Plans(NamedTuple):
    """The distinct plans P of all budgets, and what all of them share."""

    quota: list[list[list[int]]]
    """(P, chains, transitions)."""
    left: list[list[int]]
    """(P, chains)."""
    start: list[list[bool]]
    """(P, chains)."""
    lanes: list[int]
    """(P,)."""
    keep: list[list[int]]
    """(P, chains)."""
    rounds: list[list[int]]
    """Widths of each as [lanes, lanes that are scored, lanes that need the null condition, rounds, ...]."""
    of: list[int]
    """The plan of each budget in units, -1: none."""
    unit: int
    """NFE."""
    early: bool
    regroup: list[bool]
    """(transitions,)."""
    scored: list[bool]
    """(transitions,)."""
    passes: list[int]
    """(transitions,)."""


def all_plans(resolved: Resolved, budget: int, largest: Plan) -> Plans:
    """Those of all budgets up to `budget`, in NFE; chains that a smaller plan does not have never start."""
    _, _, _, _, early, regroup, scored, passes, _ = largest.planned()
    unit, seen, T = resolved.schedule.unit, dict[str, int](), len(largest.accept)
    plans = Plans([], [], [], [], [], [], [], unit, early, regroup, scored, passes)
    for units in range(budget // unit + 1):
        try:
            plan = resolved.plan(units * unit)
        except FlowfastError:  # below what the method needs
            plans.of.append(-1)
            continue
        if not plan.fits(largest):
            plans.of.append(-1)
            continue
        planned, missing = plan.planned(), largest.chains - plan.chains
        key = repr((planned.quota, planned.left, planned.start, planned.lanes, planned.keep))
        if key not in seen:
            seen[key] = len(seen)
            plans.quota.append(plan.quota + [[0] * T] * missing)
            plans.left.append(plan.left + [0] * missing)
            plans.start.append(planned.start + [False] * missing)
            plans.lanes.append(plan.lanes)
            plans.keep.append(planned.keep + list(range(plan.chains, largest.chains)))
            forecast = plan.forecast()
            alike = groupby(zip(forecast.widths, forecast.scored, forecast.null, strict=True))
            plans.rounds.append([n for each, same in alike for n in (*each, len(list(same)))])
        plans.of.append(seen[key])
    return plans
