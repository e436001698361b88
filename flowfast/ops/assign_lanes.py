"""Which child each lane of the next round evaluates, and all that the round needs to know of it, in one pass.

S slots of C chains, B = S C; a chain has up to K lanes a round; N lanes in all; T transitions. A *cell* is b K + k.
Live lanes come first, those whose score is read before the others, chain by chain, at most `width` of them; the rest is
padding. What the later transitions of a chain cost, one evaluation each, is kept back. `csrc/core/round.h` is the same
in C++.
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
    FIRST_CHAIN,
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
    """Writes lane, null_lane, lane_real, lane_live, live and position; lowers the quotas in chain to what a chain may
    spend.

    Args:
        ints, floats, flags: the packed buffers (flowfast/ops/layout.py), of slots .. top sizes; of their fields:
            chain: transition < T where alive; left: NFE.
            passes (T,): NFE of an evaluation, at least 1; 2: it takes the null pass, too.   to_end (T + 1,): NFE from a
                transition to the end of a trajectory, its own included; to_end[T] = 0.
            given (S,): the caller gave the initial latents, so that row T of the schedule's table stands in for row 0.
            scored (T,): is a child's score read there?   lane_real (3, N): time, linear time, guidance,
                which is 1 where a lane takes no null pass.
            lane (8, N): cell, slot, transition, candidate, chain, key, row of the schedule's table, parent's row of the
                store; padding: 0, but the two rows -1.
            null_lane (N,): the lanes that take the null pass, in their order, then -1.
            lane_live (N,).   live (B, K).   position (B, K): lane of a live cell, else 0.
        width: most lanes that may be live.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    sizes = Sizes(slots, chains, lanes, transitions, widest, top)
    check(ints, floats, flags, *sizes, width)
    f = views({"ints": ints, "floats": floats, "flags": flags}, sizes)
    chain, B, K, N, T = f["chain"], sizes.batch, lanes, widest, transitions
    check_passes("assign_lanes", f["passes"])
    here = chain[CHAIN_TRANSITION].clamp(0, T - 1)
    torch.minimum(chain[QUOTA], _may_try(f, here), out=chain[QUOTA])
    wanted = torch.arange(K, device=ints.device).unsqueeze(0) < (chain[QUOTA] * f["alive"]).unsqueeze(1)
    scored = f["scored"].index_select(0, here).unsqueeze(1)
    order = torch.where(wanted, torch.where(scored, 0, 1), 2).flatten()  # of cells: scored, others, none
    cells = torch.sort(order, dim=0, stable=True)[1]
    rank = torch.empty_like(cells).scatter_(0, cells, torch.arange(B * K, device=ints.device)).view(B, K)
    live = torch.logical_and(wanted, rank < width)
    f["live"].copy_(live)
    f["position"].copy_(rank * live)
    count, on, cell = min(B * K, N), f["lane_live"].fill_(False), cells.new_zeros([N])
    on[:count] = live.flatten().index_select(0, cells[:count])
    cell[:count] = cells[:count]
    _describe(f, sizes, on, cell, here)


def _describe(f: dict[str, Tensor], sizes: Sizes, on: Tensor, cell: Tensor, here: Tensor) -> None:
    """What lanes are, from their cells (N,) where they are live (on); here (B,): transitions of the chains."""
    chain, slot, lane, lane_real = f["chain"], f["slot"], f["lane"], f["lane_real"]
    C, K, T = sizes.chains, sizes.lanes, sizes.transitions
    b = torch.div(cell, K, rounding_mode="floor")
    s = torch.div(b, C, rounding_mode="floor")
    at = here.index_select(0, b)
    first = torch.logical_and(at == 0, f["given"].index_select(0, s))
    lane[CELL] = torch.where(on, cell, 0)
    lane[LANE_SLOT] = torch.where(on, s, 0)
    lane[LANE_TRANSITION] = torch.where(on, at, 0)
    lane[CANDIDATE] = torch.where(on, chain[TRIED].index_select(0, b) + cell % K, 0)
    lane[LANE_CHAIN] = torch.where(on, slot[FIRST_CHAIN].index_select(0, s) + b % C, 0)
    lane[LANE_KEY] = torch.where(on, slot[KEY].index_select(0, s), 0)
    lane[TABLE_ROW] = torch.where(on, torch.where(first, T, at), -1)
    lane[PARENT] = torch.where(on, 2 * b + chain[ACTIVE].index_select(0, b), -1)
    lane_real[TIME] = f["time"].index_select(0, lane[LANE_TRANSITION])
    lane_real[LINEAR_TIME] = f["linear_time"].index_select(0, lane[LANE_TRANSITION])
    guided = torch.logical_and(on, f["passes"].index_select(0, at) == 2)
    lane_real[LANE_GUIDANCE] = torch.where(guided, f["slot_real"][GUIDANCE].index_select(0, s), 1.0)
    f["null_lane"].copy_(_listed(guided))


def _may_try(f: dict[str, Tensor], here: Tensor) -> Tensor:
    """Candidates (B,) that chains at transitions `here` can pay for, when what the later ones cost is kept back."""
    spare = (f["chain"][LEFT] - f["to_end"].index_select(0, here + 1)).clamp(min=0)
    return torch.div(spare, f["passes"].index_select(0, here), rounding_mode="floor")


def _listed(guided: Tensor) -> Tensor:
    """The lanes (N,) that take the null pass, in their order, then -1."""
    first = torch.sort(torch.where(guided, 0, 1), dim=0, stable=True)[1]
    return torch.where(torch.arange(len(guided), device=guided.device) < guided.sum(), first, -1)


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


def check_passes(op: str, passes: Tensor) -> None:
    """Every evaluation costs something. Looked at on the CPU only: on a device it would make the host wait."""
    if passes.device.type != "cpu":
        return
    for t, cost in enumerate(passes.tolist()):
        if cost < 1:
            raise OperandError(f"{op}: passes must be at least 1 at every transition, got {cost} at transition {t}")


register(
    "assign_lanes(Tensor(a!) ints, Tensor(b!) floats, Tensor(c!) flags, int slots, int chains, int lanes, "
    "int transitions, int widest, int top, int width) -> ()",
    reference,
)
