"""Which child each lane of the next round evaluates: `lay_lanes`, which decide.py ends with, and a launch of it alone.

S slots of C chains, B = S C; K lanes a chain, N in all; T transitions; the operands are those of
flowfast/ops/assign_lanes.py, and csrc/core/round.h is the same in C++. One program: it takes the chains in tiles and
carries the number of lanes taken so far from tile to tile. Bytes moved: the columns of chains and lanes once.
"""

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._layout import (
    ACTIVE,
    CHAIN_TRANSITION,
    LEFT,
    QUOTA,
    TRIED,
    flags_of,
    floats_of,
    ints_of,
)
from flowfast.kernels._rows import warp_size


def tile(lanes: int) -> tuple[int, int, int]:
    """Chains of a tile, the lanes of a chain as a power of two, and threads: a cell for each, or registers run out."""
    threads = 4 * warp_size()
    columns = triton.next_power_of_2(lanes)
    return max(1, threads // columns), columns, threads


@triton.jit
def _lay_tile(
    first, taken, others, chain_ptr, alive_ptr, slot_ptr, slot_real_ptr, given_ptr, scored_ptr, time_ptr,
    linear_time_ptr, lane_ptr, lane_real_ptr, lane_live_ptr, live_ptr, position_ptr, width, S, B, K, N, T,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The lanes of a tile of chains that are scored (others = 0) or are not (1), behind `taken` lanes; returns how many
    lanes these chains want."""
    k = tl.arange(0, COLUMNS)[None, :]
    b = first + tl.arange(0, CHAINS)
    inside = b < B
    s = b // (B // S)
    transition = tl.load(chain_ptr + CHAIN_TRANSITION * B + b, mask=inside, other=0)
    at = tl.minimum(transition, T - 1)
    inside = inside & ((tl.load(scored_ptr + at, mask=inside, other=0) == 0) == (others == 1))
    # Every later transition keeps one evaluation back.
    available = tl.load(chain_ptr + LEFT * B + b, mask=inside, other=0) - (T - 1 - transition)
    quota = tl.minimum(tl.load(chain_ptr + QUOTA * B + b, mask=inside, other=0), available)
    tl.store(chain_ptr + QUOTA * B + b, quota, mask=inside)
    goes_on = tl.load(alive_ptr + b, mask=inside, other=0) != 0
    wanted = tl.where(goes_on, tl.minimum(tl.maximum(quota, 0), K), 0)
    before = taken + tl.cumsum(wanted, 0) - wanted

    cell = b[:, None].to(tl.int64) * K + k
    i = before[:, None] + k
    live = (k < wanted[:, None]) & (i < width)
    exists = (k < K) & inside[:, None]
    tl.store(live_ptr + cell, live, mask=exists)
    tl.store(position_ptr + cell, tl.where(live, i, 0), mask=exists)
    given = tl.load(given_ptr + s, mask=inside, other=0) != 0
    key = tl.load(slot_ptr + s, mask=inside, other=0)
    guidance = tl.load(slot_real_ptr + s, mask=inside, other=0.0)
    tried = tl.load(chain_ptr + TRIED * B + b, mask=inside, other=0)
    parent = 2 * b + tl.load(chain_ptr + ACTIVE * B + b, mask=inside, other=0)
    time = tl.load(time_ptr + at, mask=inside, other=0.0)
    linear_time = tl.load(linear_time_ptr + at, mask=inside, other=0.0)
    none = tl.zeros(cell.shape, tl.int64)
    tl.store(lane_ptr + i, cell, mask=live)
    tl.store(lane_ptr + N + i, none + s[:, None], mask=live)
    tl.store(lane_ptr + 2 * N + i, none + at[:, None], mask=live)
    tl.store(lane_ptr + 3 * N + i, tried[:, None] + k, mask=live)
    tl.store(lane_ptr + 4 * N + i, none + (b % (B // S))[:, None], mask=live)
    tl.store(lane_ptr + 5 * N + i, none + key[:, None], mask=live)
    tl.store(lane_ptr + 6 * N + i, none + tl.where((at == 0) & given, T, at)[:, None], mask=live)
    tl.store(lane_ptr + 7 * N + i, none + parent[:, None], mask=live)
    real = tl.zeros(cell.shape, tl.float32)
    tl.store(lane_real_ptr + i, real + time[:, None], mask=live)
    tl.store(lane_real_ptr + N + i, real + linear_time[:, None], mask=live)
    tl.store(lane_real_ptr + 2 * N + i, real + guidance[:, None], mask=live)
    tl.store(lane_live_ptr + i, live, mask=live)
    return tl.sum(wanted)


@triton.jit
def lay_lanes(
    chain_ptr, alive_ptr, slot_ptr, slot_real_ptr, given_ptr, scored_ptr, time_ptr, linear_time_ptr, lane_ptr,
    lane_real_ptr, lane_live_ptr, live_ptr, position_ptr, width, S, B, K, N, T,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """All of it, by one program. Live lanes come first, those that are scored before the others, chain by chain, at
    most `width`; the rest is padding."""
    taken = tl.zeros((), tl.int64)
    for others in tl.static_range(2):
        for first in range(0, B, CHAINS):
            taken += _lay_tile(
                first, taken, others, chain_ptr, alive_ptr, slot_ptr, slot_real_ptr, given_ptr, scored_ptr, time_ptr,
                linear_time_ptr, lane_ptr, lane_real_ptr, lane_live_ptr, live_ptr, position_ptr, width, S, B, K, N, T,
                CHAINS, COLUMNS,
            )  # fmt: skip

    time = tl.load(time_ptr)
    linear_time = tl.load(linear_time_ptr)
    for first in range(0, N, THREADS):
        i = first + tl.arange(0, THREADS)
        padding = (i >= tl.minimum(taken, width)) & (i < N)
        for what in tl.static_range(8):
            value = tl.full((THREADS,), -1 if what >= 6 else 0, tl.int64)
            tl.store(lane_ptr + what * N + i, value, mask=padding)
        real = tl.zeros((THREADS,), tl.float32)
        tl.store(lane_real_ptr + i, real + time, mask=padding)
        tl.store(lane_real_ptr + N + i, real + linear_time, mask=padding)
        tl.store(lane_real_ptr + 2 * N + i, real + 1.0, mask=padding)
        tl.store(lane_live_ptr + i, tl.zeros((THREADS,), tl.int1), mask=padding)


@triton.jit(do_not_specialize=["width", "S", "B", "K", "N", "T", "top"])  # one kernel, whatever the sizes of a search
def _assign_lanes_kernel(
    ints_ptr, floats_ptr, flags_ptr, width, S, B, K, N, T, top,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    chain_ptr, slot_ptr, _, _, _, _, _, _, _, lane_ptr, position_ptr, _, _, _, _, _ = ints_of(
        ints_ptr, S, B, K, N, T, top
    )
    _, slot_real_ptr, _, time_ptr, linear_time_ptr, _, lane_real_ptr, _, _ = floats_of(floats_ptr, S, B, K, N, T, top)
    alive_ptr, given_ptr, _, _, scored_ptr, lane_live_ptr, live_ptr, _ = flags_of(flags_ptr, S, B, K, N, T, top)
    lay_lanes(
        chain_ptr, alive_ptr, slot_ptr, slot_real_ptr, given_ptr, scored_ptr, time_ptr, linear_time_ptr, lane_ptr,
        lane_real_ptr, lane_live_ptr, live_ptr, position_ptr, width, S, B, K, N, T, CHAINS, COLUMNS, THREADS,
    )  # fmt: skip


def assign_lanes(
    ints: Tensor,
    floats: Tensor,
    flags: Tensor,
    slots: int,
    chains: int,
    lanes: int,
    transitions: int,
    widest: int,
    top: int,
    width: int,
) -> None:
    """Launches the kernel; operands as the reference checks them."""
    tiles, columns, threads = tile(lanes)
    _assign_lanes_kernel[(1,)](
        ints, floats, flags, width, slots, slots * chains, lanes, widest, transitions, top,
        CHAINS=tiles, COLUMNS=columns, THREADS=threads, num_warps=4,
    )  # fmt: skip
