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
    CANDIDATE,
    CELL,
    CHAIN_TRANSITION,
    FIRST_CHAIN,
    GUIDANCE,
    KEY,
    LANE_CHAIN,
    LANE_GUIDANCE,
    LANE_KEY,
    LANE_ROWS,
    LANE_SLOT,
    LANE_TRANSITION,
    LEFT,
    LINEAR_TIME,
    PARENT,
    QUOTA,
    TABLE_ROW,
    TIME,
    TRIED,
    Sizes,
    fields_of,
)
from flowfast.kernels._rows import warp_size


def tile(lanes: int) -> tuple[int, int, int]:
    """Chains of a tile, the lanes of a chain as a power of two, and threads: a cell for each, or registers run out."""
    threads = 4 * warp_size()
    columns = triton.next_power_of_2(lanes)
    return max(1, threads // columns), columns, threads


@triton.jit
def _lay_tile(first, taken, others, f, sizes, width, CHAINS: tl.constexpr, COLUMNS: tl.constexpr):
    """The lanes of a tile of chains, of those that are scored (others = 0) or of the others (1), behind `taken` lanes;
    returns how many lanes they want."""
    S, B, K, N, T, _ = sizes
    k = tl.arange(0, COLUMNS)[None, :]
    b = first + tl.arange(0, CHAINS)
    inside = b < B
    s = b // (B // S)
    transition = tl.load(f.chain + (CHAIN_TRANSITION * B + b), mask=inside, other=0)
    at = tl.minimum(transition, T - 1)
    inside = inside & ((tl.load(f.scored + at, mask=inside, other=0) == 0) == (others == 1))
    # What the later transitions cost is kept back.
    passes = tl.load(f.passes + at, mask=inside, other=1).to(tl.int32)
    spare = tl.load(f.chain + (LEFT * B + b), mask=inside, other=0) - tl.load(f.to_end + at + 1, mask=inside, other=0)
    may_try = tl.minimum(tl.maximum(spare, 0), 0x7FFFFFFF).to(tl.int32) // passes  # 64 bits take a loop to divide
    quota = tl.minimum(tl.load(f.chain + (QUOTA * B + b), mask=inside, other=0), may_try)
    tl.store(f.chain + (QUOTA * B + b), quota, mask=inside)
    goes_on = tl.load(f.alive + b, mask=inside, other=0) != 0
    wanted = tl.where(goes_on, tl.minimum(tl.maximum(quota, 0), K), 0)
    before = taken + tl.cumsum(wanted, 0) - wanted

    cell = b[:, None].to(tl.int64) * K + k
    i = before[:, None] + k
    live = (k < wanted[:, None]) & (i < width)
    exists = (k < K) & inside[:, None]
    tl.store(f.live + cell, live, mask=exists)
    tl.store(f.position + cell, tl.where(live, i, 0), mask=exists)
    given = tl.load(f.given + s, mask=inside, other=0) != 0
    key = tl.load(f.slot + (KEY * S + s), mask=inside, other=0)
    guidance = tl.load(f.slot_real + (GUIDANCE * S + s), mask=inside & (passes == 2), other=1.0)
    tried = tl.load(f.chain + (TRIED * B + b), mask=inside, other=0)
    parent = 2 * b + tl.load(f.chain + (ACTIVE * B + b), mask=inside, other=0)
    time = tl.load(f.time + at, mask=inside, other=0.0)
    linear_time = tl.load(f.linear_time + at, mask=inside, other=0.0)
    none = tl.zeros(cell.shape, tl.int64)
    tl.store(f.lane + (CELL * N + i), cell, mask=live)
    tl.store(f.lane + (LANE_SLOT * N + i), none + s[:, None], mask=live)
    tl.store(f.lane + (LANE_TRANSITION * N + i), none + at[:, None], mask=live)
    tl.store(f.lane + (CANDIDATE * N + i), tried[:, None] + k, mask=live)
    chain = tl.load(f.slot + (FIRST_CHAIN * S + s), mask=inside, other=0) + b % (B // S)
    tl.store(f.lane + (LANE_CHAIN * N + i), none + chain[:, None], mask=live)
    tl.store(f.lane + (LANE_KEY * N + i), none + key[:, None], mask=live)
    tl.store(f.lane + (TABLE_ROW * N + i), none + tl.where((at == 0) & given, T, at)[:, None], mask=live)
    tl.store(f.lane + (PARENT * N + i), none + parent[:, None], mask=live)
    real = tl.zeros(cell.shape, tl.float32)
    tl.store(f.lane_real + (TIME * N + i), real + time[:, None], mask=live)
    tl.store(f.lane_real + (LINEAR_TIME * N + i), real + linear_time[:, None], mask=live)
    tl.store(f.lane_real + (LANE_GUIDANCE * N + i), real + guidance[:, None], mask=live)
    tl.store(f.lane_live + i, live, mask=live)
    return tl.sum(wanted)


@triton.jit
def _list_null_lanes(live, f, sizes, THREADS: tl.constexpr):
    """The lanes that take the null pass, of the `live` first ones, in their order, then -1. Apart from the tiles of
    chains: with what those hold in registers it would spill."""
    N = sizes.N
    found = tl.zeros((), tl.int32)
    for first in range(0, live, THREADS):
        i = first + tl.arange(0, THREADS)
        at = tl.load(f.lane + (LANE_TRANSITION * N + i), mask=i < live, other=0)
        null = (tl.load(f.passes + at, mask=i < live, other=0) == 2).to(tl.int32)
        tl.store(f.null_lane + (found + tl.cumsum(null, 0) - 1), i.to(tl.int64), mask=null == 1)
        found += tl.sum(null)
    for first in range(0, N, THREADS):
        i = first + tl.arange(0, THREADS)
        tl.store(f.null_lane + i, tl.full((THREADS,), -1, tl.int64), mask=(i >= found) & (i < N))


@triton.jit
def lay_lanes(f, sizes, width, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr):
    """All of it, by one program. Live lanes come first, those that are scored before the others, chain by chain, at
    most `width`; the rest is padding."""
    N = sizes.N
    taken = tl.zeros((), tl.int64)
    for others in range(2):
        for first in range(0, sizes.B, CHAINS):
            taken += _lay_tile(first, taken, others, f, sizes, width, CHAINS, COLUMNS)
    live = tl.minimum(taken, width).to(tl.int32)
    tl.debug_barrier()  # all threads have laid their lanes
    _list_null_lanes(live, f, sizes, THREADS)

    time = tl.load(f.time)
    linear_time = tl.load(f.linear_time)
    for first in range(0, N, THREADS):
        i = first + tl.arange(0, THREADS)
        padding = (i >= live) & (i < N)
        for what in tl.static_range(LANE_ROWS):
            value = tl.full((THREADS,), -1 if (what == TABLE_ROW) | (what == PARENT) else 0, tl.int64)
            tl.store(f.lane + (what * N + i), value, mask=padding)
        real = tl.zeros((THREADS,), tl.float32)
        tl.store(f.lane_real + (TIME * N + i), real + time, mask=padding)
        tl.store(f.lane_real + (LINEAR_TIME * N + i), real + linear_time, mask=padding)
        tl.store(f.lane_real + (LANE_GUIDANCE * N + i), real + 1.0, mask=padding)
        tl.store(f.lane_live + i, tl.zeros((THREADS,), tl.int1), mask=padding)


@triton.jit(do_not_specialize=["width", "S", "B", "K", "N", "T", "top"])  # one kernel, whatever the sizes of a search
def _assign_lanes_kernel(
    ints_ptr, floats_ptr, flags_ptr, width, S, B, K, N, T, top,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(S, B, K, N, T, top)
    lay_lanes(fields_of(ints_ptr, floats_ptr, flags_ptr, sizes), sizes, width, CHAINS, COLUMNS, THREADS)


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
