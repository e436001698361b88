"""What the rewards of a round decide, for all chains at once and in place: accept, keep the best child, roll quota
over, take the step, keep the best finished samples, count what was spent; then, if asked, the lanes of the next round.

The rules of acceptance are those of `flowfast.ops.rollover`, but that a child that was alone goes on whatever its
reward, for there was nothing to decide; only where the model broke its chain ends. Latents that are moved: each new
best child into its chain's spare row of the store, each new finished sample among the best of its slot, nothing else.
`csrc/core/round.h` is the same in C++.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowfast.ops import assign_lanes, promote, rollover
from flowfast.ops._backend import register
from flowfast.ops._checks import OperandError, check_latents, check_operand
from flowfast.ops.assign_lanes import (
    ACTIVE,
    CELL,
    CHILD,
    LEFT,
    NAN_REWARDS,
    NFE,
    NFE_SPECULATIVE,
    QUOTA,
    REWARD_CALLS,
    ROW,
    SLOT,
    TRIED,
    UNTIL,
)

THRESHOLD, BEST_CHILD, CHILD_REWARD, REWARD, SCORE_ROWS = range(5)  # rows of score (., B) float32


def reference(
    rewards: Tensor,
    temperature: float,
    bias: Tensor | None,
    chain: Tensor,
    score: Tensor,
    alive: Tensor,
    slot: Tensor,
    slot_real: Tensor,
    given: Tensor,
    quota_table: Tensor,
    path_chain: Tensor,
    path_candidate: Tensor,
    top_reward: Tensor,
    top_row: Tensor,
    top_chain: Tensor,
    top_candidate: Tensor,
    accept: Tensor,
    finished: Tensor,
    time: Tensor,
    linear_time: Tensor,
    lane: Tensor,
    lane_real: Tensor,
    lane_live: Tensor,
    live: Tensor,
    position: Tensor,
    broken: Tensor,
    x_lane: Tensor,
    u_lane: Tensor,
    x0_lane: Tensor,
    x: Tensor,
    u: Tensor,
    top_x: Tensor,
    top_x0: Tensor,
    dense: Tensor,
    status: Tensor,
    advance: Tensor,
    store_source: Tensor,
    top_source: Tensor,
    ticket: Tensor,
    margin: float,
    carry: bool,
    passes: int,
    next_width: int,
) -> None:
    """Updates the state and writes what the round leaves.

    Args:
        rewards: (R,) float32 of the first R <= N lanes, which hold all live ones. A NaN never wins, nor does a lane
            that is marked as broken.
        temperature, bias: children compete with rewards / temperature + bias, bias (R,); without bias with rewards.
        chain .. given, time .. position: as in `assign_lanes`.
        score: (4, B) float32 threshold, best child, child's reward, parent's reward.
        quota_table, path_chain, path_candidate: (B, T) int64.
        top_reward, top_row: (S, top) float32, int64, best first.   top_chain, top_candidate: (S, top, T) int64.
        accept, finished: (T,) bool: may the first child that beats threshold + margin be taken; is x0 finished.
        broken: (N,) bool from `posterior_mean`: x0 is not finite; all False afterwards.
        x_lane, u_lane, x0_lane: (N, n) latents.   x, u: (2 B, n).   top_x, top_x0: (S * top, n).
        dense: (B, K) float32 rewards, -inf: none.
        status: (B, K) int64 0 seen, 1 best child, 2 taken, 3 discarded.   advance: (B,) int64 as in `rollover`.
        store_source, top_source: (2 B,), (S, top) int64 lane that was moved there; negative: none.
        ticket: (1,) int32, zero; counts the blocks that are done where one launch on a device does all of this.
        next_width: lanes of the next round for `assign_lanes`; -1: it is not called.

    Raises:
        OperandError: an operand has a wrong dtype, shape or layout.
    """
    check(locals())
    shared = (chain, alive, slot, slot_real, given, time, linear_time, lane, lane_real, lane_live, live, position)
    (B, K), (S, top), T, R, device = live.shape, top_reward.shape, accept.size(0), rewards.size(0), chain.device
    C = B // S
    chain_index, row_index = torch.arange(B, device=device), torch.arange(T, device=device)
    on, cell = lane_live[:R], lane[CELL, :R]
    # A reward may not see that the model broke (one that looks at 8-bit pictures): the posterior mean counts too.
    unsound = torch.logical_and(on, torch.logical_or(rewards.isnan(), broken[:R]))
    intact = torch.logical_and(on, torch.logical_not(broken[:R]))
    broken.fill_(False)
    slot[NAN_REWARDS].index_add_(0, lane[SLOT, :R], unsound.to(torch.int64))
    sound = torch.where(torch.logical_and(on, torch.logical_not(unsound)), rewards, -torch.inf)
    compete = sound if bias is None else torch.where(sound == -torch.inf, sound, sound / temperature + bias)
    place = torch.where(on, cell, B * K)  # padding goes to a cell that nobody reads
    spread = sound.new_full([B * K + 1], -torch.inf)
    dense.copy_(spread.scatter(0, place, sound)[: B * K].view(B, K))
    scores = spread.scatter(0, place, compete)[: B * K].view(B, K)

    row = chain[ROW].clamp(max=T - 1)
    threshold = torch.where(accept.index_select(0, row), score[THRESHOLD] + margin, torch.inf)
    next_quota = quota_table.gather(1, (chain[ROW] + 1).clamp(max=T - 1).unsqueeze(1)).squeeze(1)
    winner, used = torch.zeros_like(row), torch.zeros_like(row)
    rollover.reference(
        scores, live, next_quota, carry, chain[QUOTA], threshold, score[BEST_CHILD], winner, advance, used
    )
    first = place.new_zeros([B * K + 1], dtype=torch.bool).scatter(0, place, intact)[: B * K].view(B, K)[:, 0]
    alone = torch.logical_and(torch.logical_and(advance == 3, chain[TRIED] + used == 1), first)
    winner.masked_fill_(alone, 0)
    advance.masked_fill_(alone, 2)
    chain[QUOTA] = torch.where(alone, next_quota, chain[QUOTA])
    lane_index = torch.arange(K, device=device).unsqueeze(0)
    counted = torch.logical_and(live, lane_index < used.unsqueeze(1))
    won, best = winner >= 0, winner.clamp(min=0).unsqueeze(1)
    chain[CHILD] = torch.where(won, chain[TRIED] + winner, chain[CHILD])
    score[CHILD_REWARD] = torch.where(won, dense.gather(1, best).squeeze(1), score[CHILD_REWARD])
    spare = torch.arange(2, device=device).unsqueeze(0) != chain[ACTIVE].unsqueeze(1)
    source = torch.where(torch.logical_and(spare, won.unsqueeze(1)), position.gather(1, best), -1)
    store_source.copy_(source.flatten())
    promote.reference(x, u, x_lane, u_lane, store_source)

    # The finished samples of this round join the best of their slots, behind equals.
    at_end = finished.index_select(0, row).unsqueeze(1)
    fresh = torch.where(torch.logical_and(at_end, counted), dense, -torch.inf).view(S, C * K)
    merged, index = torch.sort(torch.cat([top_reward, fresh], 1), dim=1, descending=True, stable=True)
    merged, index = merged[:, :top], index[:, :top]
    new = torch.logical_and(index >= top, merged > -torch.inf)
    old, local = index.clamp(max=top - 1), (index - top).clamp(min=0)
    shift = torch.arange(S, device=device).unsqueeze(1)
    moved = (torch.where(new, torch.arange(top, device=device), old) + shift * top).flatten()
    for latents in (top_x0, top_x):
        latents.copy_(latents.index_select(0, moved))
    top_source.copy_(torch.where(new, position.view(S, C * K).gather(1, local), -1 - old))
    promote.reference(top_x0, top_x, x0_lane, x_lane, top_source.flatten())
    of_chain = torch.div(local, K, rounding_mode="floor")
    b = (of_chain + shift * C).flatten()
    here = (row_index.unsqueeze(0) == chain[ROW].index_select(0, b).unsqueeze(1)).view(S, top, T)
    candidate = chain[TRIED].index_select(0, b).view(S, top) + local % K
    wide = old.unsqueeze(2).expand(S, top, T)
    for kept, path, last in ((top_chain, path_chain, of_chain), (top_candidate, path_candidate, candidate)):
        walked = torch.where(here, last.unsqueeze(2), path.index_select(0, b).view(S, top, T))
        kept.copy_(torch.where(new.unsqueeze(2), walked, kept.gather(1, wide)))
    top_row.copy_(torch.where(new, chain[ROW].index_select(0, b).view(S, top), top_row.gather(1, old)))
    top_reward.copy_(merged)

    stepped = torch.logical_and(advance >= 1, advance <= 2)
    here = torch.logical_and(row_index.unsqueeze(0) == chain[ROW].unsqueeze(1), stepped.unsqueeze(1))
    path_chain.copy_(torch.where(here, (chain_index % C).unsqueeze(1), path_chain))
    path_candidate.copy_(torch.where(here, chain[CHILD].unsqueeze(1), path_candidate))
    score[REWARD] = torch.where(stepped, score[CHILD_REWARD], score[REWARD])
    risen = torch.where(stepped, score[CHILD_REWARD], -torch.inf)
    score[THRESHOLD] = torch.maximum(score[THRESHOLD], risen)
    score[CHILD_REWARD] = torch.where(stepped, -torch.inf, score[CHILD_REWARD])
    spent = live.sum(1)
    chain[ACTIVE] = torch.where(stepped, 1 - chain[ACTIVE], chain[ACTIVE])
    chain[LEFT] -= spent
    chain[TRIED] = torch.where(stepped, 0, chain[TRIED] + used)
    chain[ROW] += stepped
    alive.logical_and_(torch.logical_and(advance != 3, chain[ROW] < T))
    slot[NFE] += spent.view(S, C).sum(1) * passes
    slot[NFE_SPECULATIVE] += (spent - used).view(S, C).sum(1) * passes
    slot[REWARD_CALLS] += spent.view(S, C).sum(1)
    going = (top_reward[:, 0] < slot_real[UNTIL]).unsqueeze(1).expand(S, C).flatten()
    alive.logical_and_(going)
    discarded = torch.logical_and(live, torch.logical_not(counted)).to(torch.int64) * 3
    wins = (lane_index == winner.unsqueeze(1)).to(torch.int64)
    status.copy_(discarded + wins * (1 + (advance == 1).to(torch.int64)).unsqueeze(1))
    if next_width >= 0:
        assign_lanes.reference(*shared, next_width)


def check(operands: dict[str, Any]) -> None:
    """Dtypes, shapes and layout of what `reference` takes, by the names that it has there."""
    op = "decide"
    rewards, live, given, time, lane_live, top_reward, x_lane = (
        operands[name] for name in ("rewards", "live", "given", "time", "lane_live", "top_reward", "x_lane")
    )
    assign_lanes.check_sizes(op, *(operands[name] for name in assign_lanes.SHARED))
    (B, K), S, N, T, device = live.shape, given.size(0), lane_live.size(0), time.size(0) - 1, live.device
    if rewards.dim() != 1 or rewards.size(0) > N:
        raise OperandError(f"{op}: rewards must have shape (N,), N up to {N}, got {tuple(rewards.shape)}")
    if top_reward.dim() != 2 or top_reward.size(1) < 1:
        raise OperandError(
            f"{op}: top_reward must have shape (slots, top), top at least 1, got {tuple(top_reward.shape)}"
        )
    if not -1 <= operands["next_width"] <= N:
        raise OperandError(f"{op}: next_width must lie in -1..{N}, got {operands['next_width']}")
    R, top = rewards.size(0), top_reward.size(1)
    if operands["bias"] is not None:
        check_operand(op, "bias", operands["bias"], torch.float32, (R,), device)
    for name, dtype, shape in (
        ("rewards", torch.float32, (R,)),
        ("score", torch.float32, (SCORE_ROWS, B)),
        ("quota_table", torch.int64, (B, T)),
        ("path_chain", torch.int64, (B, T)),
        ("path_candidate", torch.int64, (B, T)),
        ("top_reward", torch.float32, (S, top)),
        ("top_row", torch.int64, (S, top)),
        ("top_chain", torch.int64, (S, top, T)),
        ("top_candidate", torch.int64, (S, top, T)),
        ("accept", torch.bool, (T,)),
        ("finished", torch.bool, (T,)),
        ("broken", torch.bool, (N,)),
        ("dense", torch.float32, (B, K)),
        ("status", torch.int64, (B, K)),
        ("advance", torch.int64, (B,)),
        ("store_source", torch.int64, (2 * B,)),
        ("top_source", torch.int64, (S, top)),
        ("ticket", torch.int32, (1,)),
    ):
        check_operand(op, name, operands[name], dtype, shape, device)
    check_latents(op, "x_lane", x_lane)
    rows = {"x_lane": N, "u_lane": N, "x0_lane": N, "x": 2 * B, "u": 2 * B, "top_x": S * top, "top_x0": S * top}
    for name, count in rows.items():
        check_operand(op, name, operands[name], x_lane.dtype, (count, x_lane.size(1)), device)


register(
    "decide(Tensor rewards, float temperature, Tensor? bias, Tensor(a!) chain, Tensor(b!) score, Tensor(c!) alive, "
    "Tensor(d!) slot, Tensor slot_real, Tensor given, Tensor quota_table, Tensor(e!) path_chain, "
    "Tensor(f!) path_candidate, Tensor(g!) top_reward, Tensor(h!) top_row, Tensor(i!) top_chain, "
    "Tensor(j!) top_candidate, Tensor accept, Tensor finished, Tensor time, Tensor linear_time, Tensor(k!) lane, "
    "Tensor(l!) lane_real, Tensor(m!) lane_live, Tensor(n!) live, Tensor(o!) position, Tensor(p!) broken, "
    "Tensor x_lane, Tensor u_lane, Tensor x0_lane, Tensor(q!) x, Tensor(r!) u, Tensor(s!) top_x, Tensor(t!) top_x0, "
    "Tensor(u!) dense, Tensor(v!) status, Tensor(w!) advance, Tensor(x!) store_source, Tensor(y!) top_source, "
    "Tensor(z!) ticket, float margin, bool carry, int passes, int next_width) -> ()",
    reference,
)
