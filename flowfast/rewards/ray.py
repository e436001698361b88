"""A reward of a cluster that many searches share: `ray:NAME`. What it is stands in flowfast/ray/rewards.py."""

from __future__ import annotations

from flowfast.errors import OptionError
from flowfast.rewards.host import CallableReward

ONE_LINE = (
    "an actor of a Ray cluster that many searches share: ray:NAME (`flowfast reward-server --ray NAME` starts it)"
)


def load(argument: str | None = None) -> CallableReward:
    """argument: the actor's name. Raises OptionError: there is none of that name, or no cluster."""
    if not argument:
        raise OptionError("reward ray: expected the name of an actor, got none; write ray:NAME")
    from flowfast.ray.rewards import RayReward  # which needs the extra

    return RayReward(argument)
