"""Rollover budget forcing in plain PyTorch, as one would write it from the paper: the baseline of `rbf_evaluation`.

Kim et al. 2025, arXiv 2503.19385, Algorithm 1, with several chains in one batch. It reads the same schedule and plan
as flowfast (so it converts interpolants for nothing, too) and gives the same sample when it is handed flowfast's noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowfast.flow.schedule import Schedule
from flowfast.methods.plan import Plan

Noise = Callable[[list[int], list[int]], Tensor]
"""(transition of each chain, candidate of each chain) -> normals (chains, n)."""


def eager_rbf(
    velocity: Callable[[Tensor, Tensor], Tensor],
    reward: Callable[[Tensor], Tensor],
    schedule: Schedule,
    plan: Plan,
    shape: tuple[int, ...],
    dtype: torch.dtype = torch.float32,
    noise: Noise | None = None,
    device: torch.device | None = None,
) -> tuple[float, Tensor | None, int]:
    """(best reward, its posterior mean, NFE). velocity(x (C, *shape), t (C,)), reward(x0_hat (C, *shape)) -> (C,)."""
    chains, T, n = plan.chains, schedule.transitions, math.prod(shape)
    table, time = schedule.table.to(device, dtype), schedule.time.to(device, torch.float32)
    x, u = torch.zeros(2, chains, n, dtype=dtype, device=device).unbind(0)  # the parents
    x_best, u_best = torch.zeros_like(x), torch.zeros_like(u)  # best child of each so far
    transition, tried, quota = [0] * chains, [0] * chains, [q[0] for q in plan.quota]
    left, bar, best = list(plan.left), [-math.inf] * chains, [-math.inf] * chains
    found, sample, nfe = -math.inf, None, 0
    finished = plan.finished or schedule.finished.tolist()

    while any(each < T for each in transition):
        at = torch.tensor([min(each, T - 1) for each in transition], device=device)
        a, b, c, _, d, e, _, _ = table[at].unsqueeze(2).unbind(1)
        z = torch.randn_like(x) if noise is None else noise(transition, tried)
        child = a * x + b * u + c * z
        u_child = velocity(child.view(chains, *shape), time[at]).reshape(chains, n)
        x0 = d * child + e * u_child
        scores = reward(x0.view(chains, *shape)).tolist()

        for chain, score in enumerate(scores):
            k = transition[chain]
            if k == T:
                continue
            nfe += 1
            left[chain] -= 1
            tried[chain] += 1
            quota[chain] = min(quota[chain], left[chain] + 1 - (T - 1 - k)) - 1
            if finished[k] and score > found:
                found, sample = score, x0[chain].clone()
            if score > best[chain]:
                best[chain] = score
                x_best[chain], u_best[chain] = child[chain], u_child[chain]
            accepted = plan.accept[k] and score > bar[chain]
            if accepted or quota[chain] == 0:  # take the step; what is left of the quota rolls over
                bar[chain] = max(bar[chain], best[chain])
                x[chain], u[chain] = x_best[chain], u_best[chain]
                transition[chain], tried[chain], best[chain] = k + 1, 0, -math.inf
                quota[chain] += plan.quota[chain][k + 1] if k + 1 < T else 0
    return found, sample, nfe
