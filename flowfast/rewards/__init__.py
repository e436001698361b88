"""Rewards (verifiers): one a file. A device-side reward is an `nn.Module` of the protocol `flowfast.types.Reward`; any
other callable runs on the host. What happens to a reward that misbehaves: policy.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from flowfast.errors import OptionError, RewardError
from flowfast.rewards.combine import rank_ensemble, weighted_sum
from flowfast.rewards.host import CallableReward
from flowfast.rewards.policy import guarded
from flowfast.types import Flow

NAMES = ("scenes", "sharpness")
"""A reward is a module of this package with ONE_LINE, what `flowfast rewards` prints, and load()."""


def available() -> dict[str, str]:
    """Name and one line of every built-in reward."""
    return {name: _module(name).ONE_LINE for name in NAMES}


def load(reward: Any, flow: Flow | None = None, deadline: float | None = None) -> Any:
    """A reward that is ready to score.

    Args:
        reward: a name, a weighted sum of names ("scenes*0.7+sharpness*0.3"), a module of the Reward protocol, or a
            plain callable (images, prompts) -> N scores.
        flow: the model it will score, for rewards that depend on one.
        deadline: seconds one call of a host reward may take; None: no limit.

    Raises:
        OptionError: unknown name. RewardError: not a reward. WeightError: its weights are damaged.
    """
    if isinstance(reward, str):
        terms = [_term(text, reward) for text in reward.split("+")]
        if terms == [(reward.strip(), 1.0)]:
            return _module(terms[0][0]).load()
        return weighted_sum([_module(name).load() for name, _ in terms], [weight for _, weight in terms], deadline)
    if isinstance(reward, CallableReward):
        return reward
    if isinstance(reward, nn.Module):
        if not hasattr(reward, "encode"):
            raise RewardError(
                f"{type(reward).__name__} is a module, so it is taken for a device-side reward, but it has no "
                "encode(prompts); add it (docs/design.md), or wrap it: flowfast.rewards.CallableReward(module)"
            )
        return reward
    if callable(reward):
        return CallableReward(reward, deadline=deadline)
    raise RewardError(f"expected a reward's name, a module or a callable, got {type(reward).__name__}")


def on_host(reward: Any) -> bool:
    """Does it run on the host, called with (images, prompts), rather than on the device with (images, t, cond)?"""
    return isinstance(reward, CallableReward)


def score(reward: Any, call: Callable[[], Any], count: int) -> Tensor:
    """Scores (count,) of a device-side reward, `call`, under the policy; reads no values, so the host does not wait."""
    return guarded(str(getattr(reward, "name", type(reward).__name__)), call, count)


def _term(text: str, whole: str) -> tuple[str, float]:
    """Name and weight of one term, "scenes*0.7" or "scenes"."""
    name, times, weight = (part.strip() for part in text.partition("*"))
    try:
        return name, float(weight) if times else 1.0
    except ValueError:
        raise OptionError(
            f"reward {whole!r}: expected a weight after '*', got {weight!r}; write scenes*0.7+sharpness*0.3"
        ) from None


def _module(name: str) -> Any:
    if name not in NAMES:
        raise OptionError(
            f"unknown reward {name!r}: choose one of {', '.join(NAMES)}, or a sum such as scenes*0.7+sharpness*0.3"
        )
    return importlib.import_module(f"flowfast.rewards.{name}")


__all__ = ["CallableReward", "available", "load", "on_host", "rank_ensemble", "score", "weighted_sum"]
