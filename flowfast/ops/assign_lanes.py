"""Which child each lane of the next round evaluates, and all that the round needs to know of it, in one pass.

S slots of C chains, B = S C; a chain has up to K lanes a round; N lanes in all; T transitions. A *cell* is b K + k.
Live lanes come first, those whose score is read before the others, chain by chain, at most `width` of them; the rest is
padding. A chain keeps one evaluation back for every later transition. `csrc/core/round.h` is the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops.checks import OperandError, check_operand
from flowfast.ops.layout import (
    ACTIVE,
    BUFFERS,
    CANDIDATE,
    CELL,
    CHAIN_TRANSITION,
    GUIDANCE,
    KEY,
    LANE_CHAIN,
    LANE_GUIDANCE,
    LANE_KEY,
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
    places,
    views,
)
from flowfast.ops.registry import register


def reference(
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
    """Writes lane, lane_real, lane_live, live and position; lowers the quotas in chain to what a chain may spend.

    Args:
        ints, floats, flags: the packed buffers (flowfast/ops/layout.py), of slots .. top sizes; of their fields:
            chain: transition < T where alive.
            given (S,): the caller gave the initial latents, so that row T of the schedule's table stands in for row 0.
            scored (T,): is a child's score read there?   lane_real (3, N): time, linear time, guidance.
            lane (8, N): cell, slot, transition, candidate, chain, key, row of the schedule's table, parent's row of the
                store; padding: 0, but the two rows -1.
            lane_live (N,).   live (B, K).   position (B, K): lane of a live cell, else 0.
        width: most lanes that may be live.

    Raises:
        OperandError: an operand has a wrong dtype, shape or layout.
    """
    sizes = Sizes(slots, chains, lanes, transitions, widest, top)
    check(ints, floats, flags, *sizes, width)
    f = views({"ints": ints, "floats": floats, "flags": flags}, sizes)
    chain, slot, time, linear_time = f["chain"], f["slot"], f["time"], f["linear_time"]
    B, K, C, N, T = sizes.batch, lanes, chains, widest, transitions
    torch.minimum(chain[QUOTA], chain[LEFT] - (T - 1 - chain[CHAIN_TRANSITION]), out=chain[QUOTA])
    wanted = torch.arange(K, device=ints.device).unsqueeze(0) < (chain[QUOTA] * f["alive"]).unsqueeze(1)
    scored = f["scored"].index_select(0, chain[CHAIN_TRANSITION].clamp(0, T - 1)).unsqueeze(1)
    order = torch.where(wanted, torch.where(scored, 0, 1), 2).flatten()  # of cells: scored, others, none
    cells = torch.sort(order, dim=0, stable=True)[1]
    rank = torch.empty_like(cells).scatter_(0, cells, torch.arange(B * K, device=ints.device)).view(B, K)
    live = torch.logical_and(wanted, rank < width)
    f["live"].copy_(live)
    f["position"].copy_(rank * live)
    count, on, cell = min(B * K, N), f["lane_live"].fill_(False), cells.new_zeros([N])
    on[:count] = live.flatten().index_select(0, cells[:count])
    cell[:count] = cells[:count]
    b = torch.div(cell, K, rounding_mode="floor")
    s = torch.div(b, C, rounding_mode="floor")
    at = chain[CHAIN_TRANSITION].index_select(0, b).clamp(0, T - 1)
    first = torch.logical_and(at == 0, f["given"].index_select(0, s))
    lane, lane_real = f["lane"], f["lane_real"]
    lane[CELL] = torch.where(on, cell, 0)
    lane[LANE_SLOT] = torch.where(on, s, 0)
    lane[LANE_TRANSITION] = torch.where(on, at, 0)
    lane[CANDIDATE] = torch.where(on, chain[TRIED].index_select(0, b) + cell % K, 0)
    lane[LANE_CHAIN] = torch.where(on, b % C, 0)
    lane[LANE_KEY] = torch.where(on, slot[KEY].index_select(0, s), 0)
    lane[TABLE_ROW] = torch.where(on, torch.where(first, T, at), -1)
    lane[PARENT] = torch.where(on, 2 * b + chain[ACTIVE].index_select(0, b), -1)
    lane_real[TIME] = time.index_select(0, lane[LANE_TRANSITION])
    lane_real[LINEAR_TIME] = linear_time.index_select(0, lane[LANE_TRANSITION])
    lane_real[LANE_GUIDANCE] = torch.where(on, f["slot_real"][GUIDANCE].index_select(0, s), 1.0)


def check(
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
    op = "assign_lanes"
    if widest < 0:
        raise OperandError(f"{op}: widest must be at least 0, got {widest}")
    check_buffers(op, ints, floats, flags, Sizes(slots, chains, lanes, transitions, widest, top))
    if not 0 <= width <= widest:
        raise OperandError(f"{op}: width must lie in 0..{widest}, got {width}")


def check_buffers(op: str, ints: Tensor, floats: Tensor, flags: Tensor, sizes: Sizes) -> None:
    """The packed buffers of a batch of these sizes."""
    for name in ("slots", "chains", "lanes", "transitions", "top"):
        if getattr(sizes, name) < 1:
            raise OperandError(f"{op}: {name} must be at least 1, got {getattr(sizes, name)}")
    ends = places(sizes)[1]
    for (name, dtype), buffer in zip(BUFFERS.items(), (ints, floats, flags), strict=True):
        check_operand(op, name, buffer, dtype, (ends[name],), ints.device)


register(
    "assign_lanes(Tensor(a!) ints, Tensor(b!) floats, Tensor(c!) flags, int slots, int chains, int lanes, "
    "int transitions, int widest, int top, int width) -> ()",
    reference,
)
