"""A reward of images as a reward of video: every frame is scored, and the clip gets the mean or the worst."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowfast.errors import OptionError, RewardError
from flowfast.rewards.host import CallableReward

ONE_LINE = 'an image reward over the frames of video: "frames:NAME" their mean, "frames:min:NAME" the worst'
HOW = ("mean", "min")


class Frames(nn.Module):
    """A device-side reward over clips (N, F, 3, H, W), a frame of all N at a time, so F costs no memory."""

    def __init__(self, reward: nn.Module, how: str) -> None:
        super().__init__()
        self.reward, self.how = reward, how
        self.name, self.range = _name(reward, how), _range(reward)
        self.differentiable = bool(getattr(reward, "differentiable", False))

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """The inner reward's conditions, one row a clip."""
        cond: dict[str, Tensor] = {}
        cond.update(self.reward.encode(prompts))  # type: ignore[operator]
        return cond

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Scores (N,) float32 of images (N, F, 3, H, W) in [0, 1] at linear times t (N,)."""
        check_clips(images.dim(), images.size(1))
        scores: list[Tensor] = []
        for frame in range(images.size(1)):
            scores.append(self.reward(images[:, frame], t, cond).float())
        return over_frames(torch.stack(scores, 1), self.how)


class HostFrames(CallableReward):
    """The same for a reward on the host: one call with the frames of all clips."""

    def __init__(self, reward: CallableReward, how: str) -> None:
        super().__init__(self.scores, name=_name(reward, how), range=_range(reward))
        self.reward, self.how = reward, how

    def check(self, prompt: str) -> None:
        self.reward.check(prompt)

    def scores(self, images: Tensor, prompts: Sequence[str]) -> Tensor:
        """Scores (N,) of images (N, F, 3, H, W) in [0, 1]."""
        check_clips(images.dim(), images.size(1))
        rows = [prompt for prompt in prompts for _ in range(images.size(1))]
        return over_frames(self.reward(images.flatten(0, 1), rows).view(images.shape[:2]), self.how)


def frames(reward: Any, how: str = "mean") -> Any:
    """`reward` over the frames of video; NaN of any frame makes the clip NaN.

    Args:
        reward: a name, a module of the Reward protocol, or a callable (images (N, 3, H, W), prompts) -> N scores.
        how: "mean" or "min" of the frames.

    Raises:
        OptionError: unknown `how` or name. RewardError: not a reward.
    """
    from flowfast.rewards import load as load_reward

    if how not in HOW:
        raise OptionError(f"frames: unknown how={how!r}, choose one of {', '.join(HOW)}")
    reward = load_reward(reward)
    return Frames(reward, how) if isinstance(reward, nn.Module) else HostFrames(reward, how)


def load(argument: str | None = None) -> Any:
    """argument: the inner reward, with "mean:" or "min:" before it."""
    how, _, name = (argument or "").partition(":")
    how, name = (how, name) if how in HOW else ("mean", argument or "")
    if not name:
        raise OptionError(
            "reward frames: expected the reward of a frame, got none; write frames:NAME or frames:min:NAME"
        )
    return frames(name, how)


def over_frames(scores: Tensor, how: str) -> Tensor:
    """(N,) of scores (N, F)."""
    return scores.amin(1) if how == "min" else scores.mean(1)


def check_clips(dims: int, count: int) -> None:
    if dims != 5 or count == 0:
        raise RewardError("expected video (N, F, 3, H, W) with at least one frame; score images with the reward itself")


def _name(reward: Any, how: str) -> str:
    return f"frames({how}, {getattr(reward, 'name', type(reward).__name__)})"


def _range(reward: Any) -> tuple[float, float]:
    low, high = getattr(reward, "range", (-float("inf"), float("inf")))
    return (float(low), float(high))
