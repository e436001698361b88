"""Plain sampling of the scene model, for training, for the verifier's training set and for the weight card."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def guided_velocity(model: nn.Module, x_t: Tensor, t: Tensor, tokens: Tensor, guidance: float) -> Tensor:
    """u_t (N, 3, 32, 32) after classifier-free guidance: two evaluations a row unless guidance is 1."""
    if guidance == 1.0:
        return model(x_t, t, {"tokens": tokens})
    both = {"tokens": torch.cat((tokens, torch.zeros_like(tokens)))}
    u_cond, u_null = model(torch.cat((x_t, x_t)), torch.cat((t, t)), both).chunk(2)
    return u_null + guidance * (u_cond - u_null)


def sample_ode(
    model: nn.Module, noise: Tensor, tokens: Tensor, steps: int, guidance: float, start: float = 1.0
) -> Tensor:
    """Euler's method on a uniform grid from t = start (state `noise`) to 0; returns x0 (N, 3, 32, 32)."""
    x_t = noise
    for i in range(steps):
        t = torch.full((x_t.shape[0],), start * (1.0 - i / steps))
        x_t = x_t - (start / steps) * guided_velocity(model, x_t, t, tokens, guidance)
    return x_t
