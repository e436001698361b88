"""Which child each lane of the next round evaluates, and all that the round needs to know of it, in one pass.

S slots of C chains, B = S C; a chain has up to K lanes a round; N lanes in all; T transitions. A *cell* is b K + k.
Live lanes come first, chain by chain, at most `width` of them; the rest is padding. A chain keeps one evaluation back
for every later transition. `csrc/core/round.h` is the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops._backend import register
from flowfast.ops._checks import OperandError, check_operand

ACTIVE, ROW, QUOTA, LEFT, TRIED, CHILD, CHAIN_ROWS = range(7)  # rows of chain (., B) int64
KEY, NFE, NFE_SPECULATIVE, REWARD_CALLS, NAN_REWARDS, SLOT_ROWS = range(6)  # rows of slot (., S) int64
GUIDANCE, UNTIL, SLOT_REAL_ROWS = range(3)  # rows of slot_real (., S) float32
CELL, SLOT, TRANSITION, CANDIDATE, CHAIN, LANE_KEY, KERNEL_ROW, PARENT, LANE_ROWS = range(9)  # of lane (., N) int64
TIME, LINEAR_TIME, LANE_GUIDANCE, LANE_REAL_ROWS = range(4)  # rows of lane_real (., N) float32
SHARED = (  # operands that decide has too
    "chain", "alive", "slot", "slot_real", "given", "time", "linear_time", "lane", "lane_real", "lane_live", "live",
    "position",
)  # fmt: skip


def reference(
    chain: Tensor,
    alive: Tensor,
    slot: Tensor,
    slot_real: Tensor,
    given: Tensor,
    time: Tensor,
    linear_time: Tensor,
    lane: Tensor,
    lane_real: Tensor,
    lane_live: Tensor,
    live: Tensor,
    position: Tensor,
    width: int,
) -> None:
    """Writes `lane`, `lane_real`, `lane_live`, `live` and `position`; lowers the quotas in `chain` to what a chain may
    spend.

    Args:
        chain: (6, B) int64 active, row, quota, left, tried, child; row < T where alive.
        alive: (B,) bool.
        slot: (5, S) int64 key, nfe, nfe_speculative, reward_calls, nan_rewards.
        slot_real: (2, S) float32 guidance, until.
        given: (S,) bool, the caller gave the initial latents: row T of the schedule's table stands in for row 0.
        time, linear_time: (T + 1,) float32.
        lane: (8, N) int64 cell, slot, transition, candidate, chain, key, kernel row, parent; padding: 0, but kernel row
            and parent -1.
        lane_real: (3, N) float32 time, linear time, guidance.
        lane_live: (N,) bool.   live: (B, K) bool.   position: (B, K) int64 lane of a live cell, else 0.

    Raises:
        OperandError: an operand has a wrong dtype, shape or layout.
    """
    check(chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live, position, width)
    (B, K), S, N, T, device = live.shape, given.size(0), lane_live.size(0), time.size(0) - 1, chain.device
    torch.minimum(chain[QUOTA], chain[LEFT] - (T - 1 - chain[ROW]), out=chain[QUOTA])
    wanted = torch.arange(K, device=device).unsqueeze(0) < (chain[QUOTA] * alive).unsqueeze(1)
    rank = wanted.flatten().cumsum(0) - 1
    live.copy_(torch.logical_and(wanted, (rank < width).view(B, K)))
    position.copy_(rank.view(B, K) * live)
    cells = torch.sort(torch.logical_not(live).flatten().to(torch.uint8), dim=0, stable=True)[1]
    count = min(B * K, N)
    on = torch.zeros([N], dtype=torch.bool, device=device)
    on[:count] = live.flatten().index_select(0, cells[:count])
    cell = torch.zeros([N], dtype=torch.int64, device=device)
    cell[:count] = cells[:count]
    b = torch.div(cell, K, rounding_mode="floor")
    s = torch.div(b, B // S, rounding_mode="floor")
    row = chain[ROW].index_select(0, b).clamp(max=T - 1)
    first = torch.logical_and(row == 0, given.index_select(0, s))
    lane[CELL] = torch.where(on, cell, 0)
    lane[SLOT] = torch.where(on, s, 0)
    lane[TRANSITION] = torch.where(on, row, 0)
    lane[CANDIDATE] = torch.where(on, chain[TRIED].index_select(0, b) + cell % K, 0)
    lane[CHAIN] = torch.where(on, b % (B // S), 0)
    lane[LANE_KEY] = torch.where(on, slot[KEY].index_select(0, s), 0)
    lane[KERNEL_ROW] = torch.where(on, torch.where(first, T, row), -1)
    lane[PARENT] = torch.where(on, 2 * b + chain[ACTIVE].index_select(0, b), -1)
    lane_real[TIME] = time.index_select(0, lane[TRANSITION])
    lane_real[LINEAR_TIME] = linear_time.index_select(0, lane[TRANSITION])
    lane_real[LANE_GUIDANCE] = torch.where(on, slot_real[GUIDANCE].index_select(0, s), 1.0)
    lane_live.copy_(on)


def check(
    chain: Tensor,
    alive: Tensor,
    slot: Tensor,
    slot_real: Tensor,
    given: Tensor,
    time: Tensor,
    linear_time: Tensor,
    lane: Tensor,
    lane_real: Tensor,
    lane_live: Tensor,
    live: Tensor,
    position: Tensor,
    width: int,
) -> None:
    shared = (chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live, position)
    check_sizes("assign_lanes", *shared)
    if not 0 <= width <= lane_live.size(0):
        raise OperandError(f"assign_lanes: width must lie in 0..{lane_live.size(0)}, got {width}")


def check_sizes(
    op: str,
    chain: Tensor,
    alive: Tensor,
    slot: Tensor,
    slot_real: Tensor,
    given: Tensor,
    time: Tensor,
    linear_time: Tensor,
    lane: Tensor,
    lane_real: Tensor,
    lane_live: Tensor,
    live: Tensor,
    position: Tensor,
) -> None:
    """Dtypes and shapes of what assign_lanes and decide share; sizes come from given, live, time and lane_live."""
    if (
        [given.dim(), live.dim(), time.dim(), lane_live.dim()] != [1, 2, 1, 1]
        or given.size(0) == 0
        or live.size(0) % given.size(0)
        or time.size(0) < 2
    ):
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in (given, live, time, lane_live))
        raise OperandError(
            f"{op}: expected given (S,), live (S * C, K), time (T + 1,) and lane_live (N,), got {shapes}"
        )
    B, S, N, T = live.size(0), given.size(0), lane_live.size(0), time.size(0) - 1
    for name, tensor, dtype, shape in (
        ("chain", chain, torch.int64, (CHAIN_ROWS, B)),
        ("alive", alive, torch.bool, (B,)),
        ("slot", slot, torch.int64, (SLOT_ROWS, S)),
        ("slot_real", slot_real, torch.float32, (SLOT_REAL_ROWS, S)),
        ("given", given, torch.bool, (S,)),
        ("time", time, torch.float32, (T + 1,)),
        ("linear_time", linear_time, torch.float32, (T + 1,)),
        ("lane", lane, torch.int64, (LANE_ROWS, N)),
        ("lane_real", lane_real, torch.float32, (LANE_REAL_ROWS, N)),
        ("lane_live", lane_live, torch.bool, (N,)),
        ("live", live, torch.bool, tuple(live.shape)),
        ("position", position, torch.int64, tuple(live.shape)),
    ):
        check_operand(op, name, tensor, dtype, shape, chain.device)


register(
    "assign_lanes(Tensor(a!) chain, Tensor alive, Tensor slot, Tensor slot_real, Tensor given, Tensor time, "
    "Tensor linear_time, Tensor(b!) lane, Tensor(c!) lane_real, Tensor(d!) lane_live, Tensor(e!) live, "
    "Tensor(f!) position, int width) -> ()",
    reference,
)
