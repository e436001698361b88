"""Several rewards as one: weighted sums, and ensembles that compare ranks instead of raw scores.

Both are modules when all their members are (then they run on the device and script), and host rewards otherwise. A NaN
of any member makes the sum NaN, so that the candidate never wins (policy.py).

Ranks are taken within a fixed reference sample, not within the batch: what a request gets must not depend on what else
runs beside it.
"""

import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flowfast.errors import RewardError
from flowfast.rewards.host import CallableReward
from flowfast.rewards.policy import guarded


class WeightedSum(nn.Module):
    """sum_i weight_i * f_i(reward_i), f_i the identity, or the rank within member i's reference scores."""

    references: Tensor

    def __init__(
        self, members: Sequence[nn.Module], weights: Sequence[float], references: Tensor | None = None
    ) -> None:
        """references (members, R): sorted scores of each member on the same kind of images; None: raw scores."""
        super().__init__()
        _check(members, weights)
        self.members = nn.ModuleList(members)
        self.weights = [float(weight) for weight in weights]
        self.ranked = references is not None
        self.register_buffer(
            "references",
            torch.zeros(len(members), 2, dtype=torch.float32, device="cpu") if references is None else references,
            False,
        )
        self.name = _name(members, weights, self.ranked)
        self.range = _range(members, weights, self.ranked)
        self.differentiable = not self.ranked and all(bool(member.differentiable) for member in members)

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The members' conditions, each name with its member's number before it."""
        cond: dict[str, Tensor] = {}
        for i, member in enumerate(self.members):
            for key, value in member.encode(prompts).items():  # type: ignore[operator]
                cond[str(i) + "." + key] = value
        return cond

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Scores (N,) float32."""
        total = torch.zeros([images.size(0)], dtype=torch.float32, device=images.device)
        for i, member in enumerate(self.members):
            prefix = str(i) + "."
            own: dict[str, Tensor] = {}
            for key, value in cond.items():
                if key.startswith(prefix):
                    own[key[len(prefix) :]] = value
            score = member(images, t, own).float()
            if self.ranked:
                score = rank_in(self.references[i], score)
            total = total + self.weights[i] * score
        return total


class HostSum(CallableReward):
    """The same where at least one member runs on the host; the others are called where the images are."""

    def __init__(
        self,
        members: Sequence[Any],
        weights: Sequence[float],
        references: Tensor | None = None,
        deadline: float | None = None,
    ) -> None:
        _check(members, weights)
        super().__init__(_no_function, _name(members, weights, references is not None), deadline=deadline)
        self.range = _range(members, weights, references is not None)
        self.members, self.weights, self.references = list(members), list(weights), references

    def check(self, prompt: str) -> None:
        for member in self.members:
            if isinstance(member, CallableReward):
                member.check(prompt)

    def score(self, images: Tensor, prompts: list[str], t: Tensor | None, deadline: float | None) -> Tensor:
        scores = all_scores(self.members, images, prompts, t, deadline)
        if self.references is not None:
            scores = torch.stack([rank_in(self.references[i], score) for i, score in enumerate(scores)])
        return scores.new_tensor(self.weights) @ scores


def weighted_sum(members: Sequence[Any], weights: Sequence[float], deadline: float | None = None) -> Any:
    """sum_i weights[i] * members[i]. Raises RewardError for an empty list, or weights that are not finite."""
    return _combine(members, weights, None, deadline)


def rank_ensemble(
    members: Sequence[Any],
    images: Tensor,
    prompts: Sequence[str],
    weights: Sequence[float] | None = None,
    t: Tensor | None = None,
    deadline: float | None = None,
) -> Any:
    """Weighted mean of the members' ranks within a reference sample: scores of different scales count alike.

    Args:
        images: (R, 3, H, W) the reference sample, R >= 2: pictures of the model, one for each of `prompts`.
        weights: of each member; default equal. They are scaled to sum 1.
        t: (R,) linear times of the posterior means `images`; default 0, clean pictures.

    Raises:
        RewardError: a member fails on the reference sample, or scores all of it alike.
    """
    weights = [1.0] * len(members) if weights is None else weights
    _check(members, weights)
    references = all_scores(members, images, prompts, t, deadline).sort(dim=1).values
    for member, row in zip(members, references, strict=True):
        if len(row) < 2 or not math.isfinite(float(row.sum())) or row[0] == row[-1]:
            raise RewardError(
                f"reward {_name_of(member)!r}: a rank needs at least 2 different, finite reference scores; "
                "give more images"
            )
    scale = sum(weights)
    return _combine(members, [weight / scale for weight in weights], references, deadline)


def rank_in(reference: Tensor, score: Tensor) -> Tensor:
    """The share (N,) of sorted reference scores (R,) below each score (N,), linear between them, in [0, 1] within them.

    Search leaves the reference behind; ranks that stop at 1 would then tie, so outside they go on with the mean slope.
    NaN stays NaN.
    """
    last = reference.size(0) - 1
    low, high = reference[0], reference[last]
    right = torch.searchsorted(reference, score.contiguous(), right=True).clamp(1, last)
    a, b = reference[right - 1], reference[right]
    inside = (right - 1 + (score - a).clamp(min=0) / (b - a).clamp(min=1e-12)).clamp(max=last) / last
    below, above = (score - low) / (high - low), 1 + (score - high) / (high - low)
    return torch.where(score < low, below, torch.where(score >= high, above, inside))


def all_scores(
    members: Sequence[Any], images: Tensor, prompts: Sequence[str], t: Tensor | None, deadline: float | None = None
) -> Tensor:
    """Scores (members, N) float32 on the CPU. deadline: seconds for all members together; one that runs on the host
    also keeps its own. Raises RewardError by the policy."""
    t = images.new_zeros(len(prompts)) if t is None else t.to(images.device)
    until = None if deadline is None else time.monotonic() + deadline
    rows = []
    for member in members:
        left = None if until is None else max(until - time.monotonic(), 1e-3)
        if isinstance(member, nn.Module):
            cond = {key: value.to(images.device) for key, value in member.encode(list(prompts)).items()}  # type: ignore[operator]
            answer = guarded(_name_of(member), partial(member, images, t, cond), len(prompts), left)
        elif left is not None and isinstance(member, CallableReward):
            answer = member.score(images, list(prompts), t, min(left, member.deadline or left))
        else:
            answer = member(images, prompts, t)
        rows.append(answer.detach().cpu())
    return torch.stack(rows)


def _combine(
    members: Sequence[Any], weights: Sequence[float], references: Tensor | None, deadline: float | None
) -> Any:
    if all(isinstance(member, nn.Module) for member in members):
        return WeightedSum(members, weights, references)
    return HostSum(members, weights, references, deadline)


def _no_function(images: Tensor, prompts: Sequence[str]) -> Any:
    raise RewardError("a combined reward is called as a whole")


def _check(members: Sequence[Any], weights: Sequence[float]) -> None:
    if not members or len(members) != len(weights) or not all(math.isfinite(weight) for weight in weights):
        raise RewardError(
            f"expected one finite weight for each of at least one reward, got {len(members)} rewards and "
            f"weights {list(weights)}"
        )


def _name_of(member: Any) -> str:
    return str(getattr(member, "name", type(member).__name__))


def _name(members: Sequence[Any], weights: Sequence[float], ranked: bool) -> str:
    text = "+".join(f"{_name_of(member)}*{weight:g}" for member, weight in zip(members, weights, strict=True))
    return f"rank({text})" if ranked else text


def _range(members: Sequence[Any], weights: Sequence[float], ranked: bool) -> tuple[float, float]:
    if ranked:
        return (-math.inf, math.inf)
    low = high = 0.0
    for member, weight in zip(members, weights, strict=True):
        if weight:
            ends = sorted(weight * end for end in getattr(member, "range", (-math.inf, math.inf)))
            low, high = low + ends[0], high + ends[1]
    return (low, high)
