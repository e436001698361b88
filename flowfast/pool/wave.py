"""What one wave of a prompt is: a small search of the method."""

from __future__ import annotations

import math
from bisect import bisect_left
from typing import Any, NamedTuple

from flowfast.config import SearchConfig
from flowfast.errors import BudgetError, OptionError
from flowfast.resolve import Resolved


class Wave(NamedTuple):
    nfe: int
    """That it costs at most."""
    chains: int


def check_pool(config: SearchConfig, latents: Any = None) -> int:
    """The budget of a prompt. Raises OptionError."""
    if latents is not None:
        raise OptionError("latents are of one search, a pool makes many: leave one of them out")
    if config.seconds is not None or config.budget is None:
        raise OptionError("a pool shares a budget in NFE, got one in seconds: give --budget")
    if config.first_chain:
        raise OptionError("first_chain and pool: the waves of a pool choose their chains themselves; leave it out")
    return config.budget


def ceiling_of(reward: Any) -> float:
    """The best that a reward can be. Raises OptionError where it has no end."""
    high = float(getattr(reward, "range", (-math.inf, math.inf))[1])
    if not math.isfinite(high):
        raise OptionError(
            "a pool goes to the prompts that are furthest from the best reward there is, and this reward does not say "
            "what that is: give it a `range` with a finite end"
        )
    return high


def wave_of(resolved: Resolved, config: SearchConfig, budget: int) -> Wave:
    """As asked for (`pool_wave`), else the smallest search with as many chains as the method takes in a wave, within a
    prompt's share. Raises BudgetError, OptionError."""
    asked, chains = config.pool_wave, resolved.method.wave
    if chains is None:
        raise OptionError(f"method {resolved.method.name!r} has no use for more budget: leave pool out")
    if asked is not None and asked > budget:
        raise BudgetError(f"a wave of {asked} NFE is more than the {budget} of a prompt: lower pool_wave")
    high = asked or budget
    if asked is None and chains:
        high = bisect_left(range(1, budget), True, key=lambda nfe: chains_of(resolved, nfe) >= chains) + 1
    elif asked is None and chains_of(resolved, budget // 2):
        high = budget // 2
    plan = resolved.plan(high)
    forecast = plan.forecast()
    return Wave(min(high, sum(forecast.widths) + sum(forecast.null)), plan.chains)


def chains_of(resolved: Resolved, budget: int) -> int:
    """Of its plan; 0: it is too small for one."""
    try:
        return resolved.plan(budget).chains if budget else 0
    except BudgetError:
        return 0
