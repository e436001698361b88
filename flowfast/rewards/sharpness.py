"""Sharpness, a reward that needs no weights and no prompt: for pipelines without a verifier, and as a second voice."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ONE_LINE = "mean absolute difference of neighbouring pixels, 0 to 1; ignores the prompt"


class Sharpness(nn.Module):
    """Mean |difference| of horizontally and vertically neighbouring pixels of images (N, 3, H, W) in [0, 1]."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "sharpness"
        self.range = (0.0, 1.0)
        self.differentiable = True

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """Nothing of the prompt matters: an empty column, so that rows can be counted."""
        return {"none": torch.zeros([len(prompts), 0], dtype=torch.float32, device=torch.device("cpu"))}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        """Scores (N,) float32; t and cond are not read."""
        across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean(dim=[1, 2, 3])
        down = (images[:, :, 1:] - images[:, :, :-1]).abs().mean(dim=[1, 2, 3])
        return (0.5 * (across + down)).float()


def load() -> Sharpness:
    return Sharpness()
