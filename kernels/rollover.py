"""One round of rollover budget forcing for every chain (Kim et al. 2025, arXiv 2503.19385, algorithm 1).

rewards: (B, K) float32, live: (B, K) bool; the columns are (B,): next_quota, quota, winner, advance, used int64,
threshold, best_child float32. A thread owns a chain and walks its lanes in order, as csrc/core/rollover.h does. Bytes
moved: rewards, live and the columns once.
"""

import triton
import triton.language as tl
from torch import Tensor

CHAINS = 128  # of a program


@triton.jit
def _rollover_kernel(
    rewards_ptr, live_ptr, next_quota_ptr, quota_ptr, threshold_ptr, best_child_ptr, winner_ptr, advance_ptr, used_ptr,
    chains, lanes, CARRY: tl.constexpr, CHAINS: tl.constexpr,
):  # fmt: skip
    chain = tl.program_id(0).to(tl.int64) * CHAINS + tl.arange(0, CHAINS)
    inside = chain < chains
    quota = tl.load(quota_ptr + chain, mask=inside, other=0)
    threshold = tl.load(threshold_ptr + chain, mask=inside, other=0.0)
    best_child = tl.load(best_child_ptr + chain, mask=inside, other=0.0)
    winner = tl.full((CHAINS,), -1, tl.int64)
    advance = tl.zeros((CHAINS,), tl.int64)
    used = tl.zeros((CHAINS,), tl.int64)
    active = inside & (quota > 0)
    for k in range(lanes):
        at = chain * lanes + k
        active = active & (tl.load(live_ptr + at, mask=inside, other=0) != 0)
        reward = tl.load(rewards_ptr + at, mask=active, other=0.0)
        used = tl.where(active, used + 1, used)
        quota = tl.where(active, quota - 1, quota)
        better = active & (reward > best_child)  # NaN compares false
        best_child = tl.where(better, reward, best_child)
        winner = tl.where(better, k, winner)
        accepted = active & (reward > threshold)
        threshold = tl.where(accepted, reward, threshold)
        spent = active & (quota == 0)
        advance = tl.where(accepted, 1, tl.where(spent, 2, advance))
        active = active & (advance == 0)
    none = float("-inf")
    advance = tl.where((advance == 2) & (best_child == none), 3, advance)
    advanced = (advance == 1) | (advance == 2)
    next_quota = tl.load(next_quota_ptr + chain, mask=inside, other=0)
    quota = tl.where(advanced, quota + next_quota if CARRY else next_quota, quota)
    best_child = tl.where(advanced, none, best_child)
    tl.store(quota_ptr + chain, quota, mask=inside)
    tl.store(threshold_ptr + chain, threshold, mask=inside)
    tl.store(best_child_ptr + chain, best_child, mask=inside)
    tl.store(winner_ptr + chain, winner, mask=inside)
    tl.store(advance_ptr + chain, advance, mask=inside)
    tl.store(used_ptr + chain, used, mask=inside)


def rollover(
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
    """Launches the kernel; operands as the reference checks them."""
    chains, lanes = rewards.shape
    if chains == 0:
        return
    _rollover_kernel[(triton.cdiv(chains, CHAINS),)](
        rewards, live, next_quota, quota, threshold, best_child, winner, advance, used, chains, lanes,
        CARRY=carry, CHAINS=CHAINS, num_warps=4,
    )  # fmt: skip
