"""Images as bytes, for rewards that hand them to something that is not torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.errors import RewardError


def to_pixels(images: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 on the CPU of images (N, 3, H, W) in [0, 1], clamped and rounded; NaN becomes 0.

    Raises:
        RewardError: another shape.
    """
    if images.dim() != 4 or images.shape[1] != 3:
        raise RewardError(f"expected images (N, 3, H, W), got {tuple(images.shape)}; for video wrap the reward: frames")
    return (images.detach().float().nan_to_num(0.0).clamp(0, 1) * 255).round().to(torch.uint8).cpu()
