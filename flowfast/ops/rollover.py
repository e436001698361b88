"""One round of rollover budget forcing for every chain: accept, spend, roll the rest over.

Kim et al. 2025, arXiv 2503.19385, algorithm 1. `csrc/core/rollover.h` is the same in C++.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowfast.ops._backend import register
from flowfast.ops._checks import OperandError, check_operand


def reference(
    rewards: Tensor,
    live: Tensor,
    next_quota: Tensor,
    carry: bool,
    quota: Tensor,
    threshold: Tensor,
    best_child: Tensor,
    winner: Tensor,
    advance: Tensor,
    used: Tensor,
) -> None:
    """Updates `quota`, `threshold` and `best_child`; writes `winner`, `advance` and `used`.

    Per chain, in lane order while the lane is live and quota is left: the candidate counts (used + 1, quota - 1). Above
    best_child it becomes the best child, above threshold it is accepted and the round ends for this chain. With the
    quota gone the step is spent. NaN rewards lose every comparison; so do ties.

    Args:
        rewards: (B, K) float32, higher is better.
        live: (B, K) bool, a prefix of each row: what follows the first False is not looked at.
        next_quota: (B,) int64, candidates of the next step.
        carry: add what is left of the quota to the next step's (rollover) instead of dropping it.
        quota: (B,) int64, candidates left for this step. 0 or less at the start: no candidate counts.
        threshold: (B,) float32, the reward to beat (r*); +inf: never accept. Rises on acceptance only.
        best_child: (B,) float32, best reward of this step so far; -inf: none. Back to -inf when the chain advances.
        winner: (B,) int64, the lane that became the best child this round, or -1.
        advance: (B,) int64: 0 stay, 1 accepted, 2 spent, 3 dead (spent, nothing above -inf came; the state is kept).
        used: (B,) int64, candidates that counted.

    Raises:
        OperandError: an operand has a wrong dtype, shape or layout.
    """
    check(rewards, live, next_quota, quota, threshold, best_child, winner, advance, used)
    winner.fill_(-1)
    advance.zero_()
    used.zero_()
    active = quota > 0
    for k in range(rewards.shape[1]):
        active = active & live[:, k]
        used += active
        quota -= active.to(torch.int64)
        reward = rewards[:, k]
        better = active & (reward > best_child)  # NaN compares false
        best_child.copy_(torch.where(better, reward, best_child))
        winner.masked_fill_(better, k)
        accepted = active & (reward > threshold)
        threshold.copy_(torch.where(accepted, reward, threshold))
        spent = active & ~accepted & (quota == 0)
        advance += accepted.to(torch.int64) + 2 * spent.to(torch.int64)
        active = active & ~accepted & ~spent
    advance += ((advance == 2) & (best_child == -math.inf)).to(torch.int64)
    advanced = (advance == 1) | (advance == 2)
    quota.copy_(torch.where(advanced, (quota if carry else torch.zeros_like(quota)) + next_quota, quota))
    best_child.masked_fill_(advanced, -math.inf)


def check(
    rewards: Tensor,
    live: Tensor,
    next_quota: Tensor,
    quota: Tensor,
    threshold: Tensor,
    best_child: Tensor,
    winner: Tensor,
    advance: Tensor,
    used: Tensor,
) -> None:
    op = "rollover"
    if rewards.dim() != 2:
        raise OperandError(f"{op}: rewards must have shape (chains, lanes), got {tuple(rewards.shape)}")
    chains, lanes = rewards.shape
    check_operand(op, "rewards", rewards, torch.float32, (chains, lanes), rewards.device)
    check_operand(op, "live", live, torch.bool, (chains, lanes), rewards.device)
    integers = {"next_quota": next_quota, "quota": quota, "winner": winner, "advance": advance, "used": used}
    for name, column in integers.items():
        check_operand(op, name, column, torch.int64, (chains,), rewards.device)
    check_operand(op, "threshold", threshold, torch.float32, (chains,), rewards.device)
    check_operand(op, "best_child", best_child, torch.float32, (chains,), rewards.device)


register(
    "rollover(Tensor rewards, Tensor live, Tensor next_quota, bool carry, Tensor(a!) quota, Tensor(b!) threshold, "
    "Tensor(c!) best_child, Tensor(d!) winner, Tensor(e!) advance, Tensor(f!) used) -> ()",
    reference,
)
