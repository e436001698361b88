"""Rewards (verifiers): one a file. A device-side reward is an `nn.Module` of the protocol `flowfast.types.Reward`; any
other callable runs on the host. What happens to a reward that misbehaves: policy.py."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowfast import secrets
from flowfast.errors import OptionError, RewardError
from flowfast.models.answers import version_of
from flowfast.rewards.combine import rank_ensemble, weighted_sum
from flowfast.rewards.host import CallableReward, check_deadline
from flowfast.rewards.policy import guarded
from flowfast.surroundings import plain_defaults
from flowfast.types import Flow

NAMES = {
    "scenes": "scenes",
    "sharpness": "sharpness",
    "aesthetic": "aesthetic",
    "clipscore": "clip_score",
    "compressibility": "compressibility",
    "counting": "counting",
    "frames": "frames",
    "hpsv2": "hpsv2",
    "http": "http",
    "ocr": "ocr",
    "pickscore": "pick_score",
    "ray": "ray",
    "vqascore": "vqa_score",
}
"""Name: module of this package with ONE_LINE, what `flowfast rewards` prints, and load() or load(argument | None)."""

DIFFERENTIABLE = ("scenes", "sharpness", "aesthetic", "clipscore", "pickscore", "hpsv2", "vqascore")
"""Those of NAMES that have a gradient where they run on the device."""


def available() -> dict[str, str]:
    """Name and one line of every built-in reward."""
    return {name: module_of(name).ONE_LINE + "; has a gradient" * (name in DIFFERENTIABLE) for name in NAMES}


def load(reward: Any, flow: Flow | None = None, deadline: float | None = None) -> Any:
    """A reward that is ready to score.

    Args:
        reward: a name, a name with what it needs ("clipscore:FOLDER_OR_ID", "http://HOST:PORT/PATH"), a weighted sum
            ("clipscore:FOLDER*0.7+sharpness*0.3"), a module of the Reward protocol, or a plain callable
            (images, prompts) -> N scores.
        flow: the model it will score, for rewards that depend on one.
        deadline: seconds one call of a host reward may take; None: no limit.

    Raises:
        OptionError: unknown name. RewardError: not a reward. WeightError: its weights are missing or damaged.
    """
    check_deadline(deadline)
    if isinstance(reward, str):
        terms = parse(secrets.sealed(reward))
        members = [_load(term, deadline) for term in terms]
        if len(terms) == 1 and not terms[0].weighted:
            return members[0]
        return weighted_sum(members, [term.weight for term in terms], deadline)
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


def check_gradient(reward: Any) -> None:
    """Raises OptionError unless the reward can steer a search by its gradient."""
    if on_host(reward) or not getattr(reward, "differentiable", False):
        lacks = "runs on the host" if on_host(reward) else "is not declared differentiable"
        raise OptionError(
            f"gradient guidance needs a differentiable reward, but {name_of(reward)!r} {lacks}: take one of "
            f"{', '.join(DIFFERENTIABLE)}, a sum of these, frames: of one, or a module of your own (docs/design.md)"
        )


def encode_alone(reward: Any, prompts: Sequence[str]) -> dict[str, Tensor]:
    """Conditions of a device-side reward, each prompt's to the bit what they are alone, so that a replay can follow the
    gradient; together where they have different lengths."""
    rows = [reward.encode([prompt]) for prompt in prompts]
    if any(row[name].shape != value.shape for row in rows for name, value in rows[0].items()):
        return dict(reward.encode(list(prompts)))
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def score(reward: Any, call: Callable[[], Any], images: Tensor) -> Tensor:
    """Scores (N,) of a device-side reward's `call` on images (N, ...), under the policy; reads no values, so the host
    does not wait."""
    before = version_of(images)
    scores = guarded(name_of(reward), call, images.shape[0])
    if version_of(images) != before:  # they may be the latents that a search goes on from
        raise RewardError(
            f"reward {name_of(reward)!r} changed the images that it was given in place: let it work on a copy, "
            "images.clone()"
        )
    return scores


def graded(reward: Any) -> Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor]:
    """A device-side reward under the policy, for a search that takes its gradient: scores keep their graph."""
    return lambda images, t, cond: score(reward, lambda: reward(images, t, cond), images)


def name_of(reward: Any) -> str:
    return str(getattr(reward, "name", type(reward).__name__))


class Term(NamedTuple):
    """One term of a reward's text: "name", "name:argument" or either with "*weight"."""

    name: str
    argument: str | None
    weight: float
    weighted: bool


def parse(text: str) -> list[Term]:
    """The terms of "name:argument*weight+name". A URL is an argument of `http`, with or without "http:" before it.

    An argument may hold ":", "/" and, where no reward's name follows, "+"; what stands behind its last "*" is a weight.

    Raises:
        OptionError: unknown name, a weight that is no number, or an argument for a reward without one.
    """
    pieces: list[str] = []
    for piece in text.split("+"):
        if pieces and ":" in pieces[-1] and _split(piece)[0] not in NAMES:
            pieces[-1] += "+" + piece
        else:
            pieces.append(piece)
    return [_term(piece, text) for piece in pieces]


def module_of(name: str) -> Any:
    """The module of a built-in reward. Raises OptionError for an unknown name."""
    if name not in NAMES:
        raise OptionError(
            f"unknown reward {name!r}: choose one of {', '.join(NAMES)}, or a sum such as scenes*0.7+sharpness*0.3"
        )
    return importlib.import_module(f"flowfast.rewards.{NAMES[name]}")


def _split(piece: str) -> tuple[str, str | None, str | None]:
    """Name, argument and weight of one term, as text."""
    term, times, weight = piece.rpartition("*")
    term = (term if times else piece).strip()
    if term.lower().startswith(("http://", "https://")):
        term = "http:" + term
    name, colon, argument = (part.strip() for part in term.partition(":"))
    return name, argument if colon else None, weight.strip() if times else None


def _term(piece: str, whole: str) -> Term:
    name, argument, weight = _split(piece)
    takes_one = bool(inspect.signature(module_of(name).load).parameters)
    if argument is not None and not (takes_one and argument):
        raise OptionError(
            f"reward {whole!r}: expected something after {name + ':'!r}, or {name!r} alone"
            if takes_one
            else f"reward {whole!r}: {name!r} takes nothing after ':', got {argument!r}; write {name!r} alone"
        )
    try:
        return Term(name, argument, 1.0 if weight is None else float(weight), weight is not None)
    except ValueError:
        raise OptionError(
            f"reward {whole!r}: expected a weight after '*', got {weight!r}; write scenes*0.7+sharpness*0.3"
        ) from None


@plain_defaults()
def _load(term: Term, deadline: float | None) -> Any:
    """One term, ready to score; one on the host keeps the deadline."""
    module = module_of(term.name)
    found = module.load() if term.argument is None else module.load(term.argument)
    if isinstance(found, CallableReward) and found.deadline is None:
        found.deadline = deadline
    return found


__all__ = ["CallableReward", "available", "load", "on_host", "rank_ensemble", "score", "weighted_sum"]
