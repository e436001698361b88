"""What the rewards of a round decide, for all chains at once and in place: accept, keep the best child, roll quota
over, take the step, keep the best finished samples, count what was spent; then, if asked, the lanes of the next round.

The rule of acceptance is that of rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, algorithm 1), but that a
child that was alone goes on whatever its reward, for there was nothing to decide; only where the model broke its chain
ends. Children whose score nobody reads (`scored`) compete with 0 and leave threshold, finished samples and the counts
of rewards alone. Latents that are moved: each new best child into its chain's spare row of the store, each new finished
sample among the best of its slot, nothing else. `csrc/core/round.h` is the same in C++.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flowfast.ops.assign_lanes import check_buffers, check_passes
from flowfast.ops.assign_lanes import reference as assign_lanes
from flowfast.ops.checks import OperandError, check_latents, check_operand
from flowfast.ops.layout import (
    ACTIVE,
    BEST_CHILD,
    CELL,
    CHAIN_TRANSITION,
    CHILD,
    CHILD_REWARD,
    EVALUATIONS,
    LANE_SLOT,
    LEFT,
    NAN_REWARDS,
    NFE,
    NFE_SPECULATIVE,
    QUOTA,
    REWARD,
    REWARD_CALLS,
    THRESHOLD,
    TRIED,
    UNTIL,
    Sizes,
    views,
)
from flowfast.ops.registry import register

STAY, ACCEPTED, SPENT, DEAD = range(4)  # of advance
SEEN, BEST, TAKEN, DISCARDED = range(4)  # of status


def reference(
    rewards: Tensor,
    temperature: float,
    bias: Tensor | None,
    ints: Tensor,
    floats: Tensor,
    flags: Tensor,
    x_lane: Tensor,
    u_lane: Tensor,
    x0_lane: Tensor,
    x: Tensor,
    u: Tensor,
    top_x: Tensor,
    top_x0: Tensor,
    slots: int,
    lanes: int,
    transitions: int,
    margin: float,
    carry: bool,
    next_width: int,
) -> None:
    """Updates the state and writes what the round leaves.

    Args:
        rewards: (R,) float32 of the first R <= N lanes, which hold all live ones that are scored. A NaN never wins, nor
            does a lane that is marked as broken or whose image is not finite.
        temperature, bias: children compete with (reward - centre) / temperature + bias, bias (R,); without bias with
            reward - centre.
        ints, floats, flags: the packed buffers (flowfast/ops/layout.py); below, their fields.
        x_lane, u_lane, x0_lane: (N, n) latents.   x, u: (2 B, n).   top_x, top_x0: (S * top, n).
        slots, lanes, transitions: S, K, T; the other sizes are those of the latents.
        margin, carry: by how much must a child beat the threshold to be taken at once; does unused quota roll over?
        next_width: lanes of the next round for `assign_lanes`; -1: it is not called.

    Fields read and written:
        chain, slot, alive, score, path_chain, path_candidate; top_reward, best first, top_transition, top_chain,
        top_candidate; what `assign_lanes` writes; broken: the posterior mean of a lane is not finite, all False
        afterwards; ticket: 0, counts the blocks that are done where one launch on a device does all of this.
    Fields read:
        quota_table; passes: NFE of a lane there, at least 1; scored: is a lane's score read there; centre: taken
        off a reward there before it is compared; accept: may the first child that beats threshold + margin be taken;
        finished: is x0 finished; given, time, linear_time, slot_real (guidance, until); image_sum (N,): the sum of a
        lane's image, finite where the image is.
    Fields written:
        dense (B, K): rewards, -inf: none, NaN: not scored.   status (B, K): 0 seen, 1 best child, 2 taken, 3 discarded.
        advance (B,): 0 stay, 1 accepted, 2 spent, 3 dead.   store_source, top_source: lane moved there; negative: none.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    latents = {"x_lane": x_lane, "u_lane": u_lane, "x0_lane": x0_lane, "x": x, "u": u, "top_x": top_x, "top_x0": top_x0}
    sizes = check(rewards, bias, ints, floats, flags, latents, slots, lanes, transitions, next_width)
    f = views({"ints": ints, "floats": floats, "flags": flags}, sizes)
    round_ = _Round(f, sizes, rewards, temperature, bias)
    verdict = _choose(f, sizes, round_, margin, carry)
    _keep_children(f, sizes, round_, verdict, latents)
    _keep_finished(f, sizes, round_, verdict, latents)
    _settle(f, sizes, round_, verdict)
    if next_width >= 0:
        assign_lanes(ints, floats, flags, *sizes, next_width)


class _Round:
    """The rewards of a round by cell, from the state as it is before the round is settled."""

    def __init__(
        self, f: dict[str, Tensor], sizes: Sizes, rewards: Tensor, temperature: float, bias: Tensor | None
    ) -> None:
        B, K, R, N = sizes.batch, sizes.lanes, rewards.size(0), sizes.widest
        check_passes("decide", f["passes"])
        self.at = f["chain"][CHAIN_TRANSITION].clamp(0, sizes.transitions - 1)
        self.scored = f["scored"].index_select(0, self.at)
        cell, live = f["lane"][CELL], f["lane_live"]
        b = torch.div(cell, K, rounding_mode="floor")
        of_lane = self.scored.index_select(0, b)
        seen = torch.logical_and(live, torch.arange(N, device=live.device) < R)
        on = torch.logical_and(seen, of_lane)
        padded = torch.cat([rewards, rewards.new_zeros([N - R])])
        # A reward may not see that the model broke, or that a picture is not finite: in 8 bits NaN is black.
        wrong = padded.isnan() | f["broken"] | torch.logical_not(f["image_sum"].isfinite())
        self.unsound = torch.logical_and(on, wrong)
        intact = torch.logical_and(live, torch.logical_not(f["broken"]))
        known = torch.logical_and(on, torch.logical_not(wrong))
        value = torch.where(known, padded, torch.where(torch.logical_and(intact, ~of_lane), 0.0, -torch.inf))
        place = torch.where(live, cell, B * K)  # padding goes to a cell that nobody reads

        def by_cell(values: Tensor, empty: float) -> Tensor:
            return values.new_full([B * K + 1], empty).scatter(0, place, values)[: B * K].view(B, K)

        self.reward = by_cell(value, -torch.inf)
        compete = padded - f["centre"].index_select(0, self.at.index_select(0, b))
        if bias is not None:
            compete = compete / temperature + torch.cat([bias, bias.new_zeros([N - R])])
        self.score = by_cell(torch.where(torch.logical_and(known, value > -torch.inf), compete, value), -torch.inf)
        self.intact = by_cell(torch.logical_and(on, intact), False)


class _Verdict(NamedTuple):
    winner: Tensor
    """(B,): the lane that became the best child in this round, or -1."""
    advance: Tensor
    used: Tensor
    """(B,): candidates that counted."""


def _choose(f: dict[str, Tensor], sizes: Sizes, round_: _Round, margin: float, carry: bool) -> _Verdict:
    """The rule of rollover budget forcing, and of children that were alone; changes quota and best child.

    Per chain, in lane order while the lane is live and quota is left: the candidate counts. Above best_child it becomes
    the best child, above the threshold it is accepted and the round ends for this chain. With the quota gone the step
    is spent. NaN loses every comparison; so do ties.
    """
    chain, score, live, at = f["chain"], f["score"], f["live"], round_.at
    greedy = torch.logical_and(f["accept"].index_select(0, at), round_.scored)
    bar = torch.where(greedy, score[THRESHOLD] + margin, torch.inf)
    after = (chain[CHAIN_TRANSITION] + 1).clamp(max=sizes.transitions - 1).unsqueeze(1)
    next_quota = f["quota_table"].gather(1, after).squeeze(1)
    winner, advance, used = torch.full_like(at, -1), torch.zeros_like(at), torch.zeros_like(at)
    quota, best_child = chain[QUOTA], score[BEST_CHILD]
    active = quota > 0
    for k in range(sizes.lanes):
        active = active & live[:, k]
        used += active
        quota -= active.to(torch.int64)
        reward = round_.score[:, k]
        better = active & (reward > best_child)  # NaN compares false
        best_child.copy_(torch.where(better, reward, best_child))
        winner.masked_fill_(better, k)
        accepted = active & (reward > bar)
        spent = active & ~accepted & (quota == 0)
        advance += ACCEPTED * accepted.to(torch.int64) + SPENT * spent.to(torch.int64)
        active = active & ~accepted & ~spent
    advance += ((advance == SPENT) & (best_child == -torch.inf)).to(torch.int64)
    alone = (advance == DEAD) & (chain[TRIED] + used == 1) & round_.intact[:, 0]
    advanced = (advance == ACCEPTED) | (advance == SPENT)
    quota.copy_(torch.where(advanced, (quota if carry else torch.zeros_like(quota)) + next_quota, quota))
    quota.copy_(torch.where(alone, next_quota, quota))
    best_child.masked_fill_(advanced, -torch.inf)
    winner.masked_fill_(alone, 0)
    advance.masked_fill_(alone, SPENT)
    f["advance"].copy_(advance)
    return _Verdict(winner, advance, used)


def _keep_children(
    f: dict[str, Tensor], sizes: Sizes, round_: _Round, verdict: _Verdict, latents: dict[str, Tensor]
) -> None:
    """New best children go into the rows of the store that their parents do not stand in."""
    chain, won = f["chain"], verdict.winner >= 0
    best = verdict.winner.clamp(min=0).unsqueeze(1)
    chain[CHILD] = torch.where(won, chain[TRIED] + verdict.winner, chain[CHILD])
    valued = torch.logical_and(won, round_.scored)
    f["score"][CHILD_REWARD] = torch.where(valued, round_.reward.gather(1, best).squeeze(1), f["score"][CHILD_REWARD])
    spare = torch.arange(2, device=won.device).unsqueeze(0) != chain[ACTIVE].unsqueeze(1)
    source = torch.where(torch.logical_and(spare, won.unsqueeze(1)), f["position"].gather(1, best), -1)
    f["store_source"].copy_(source.flatten())
    _promote(latents["x"], latents["x_lane"], f["store_source"])
    _promote(latents["u"], latents["u_lane"], f["store_source"])


def _promote(store: Tensor, lanes: Tensor, source: Tensor) -> None:
    """store[b] <- lanes[source[b]] where source[b] >= 0."""
    rows = torch.where(source >= 0)[0]
    store[rows] = lanes[source[rows]]


def _keep_finished(
    f: dict[str, Tensor], sizes: Sizes, round_: _Round, verdict: _Verdict, latents: dict[str, Tensor]
) -> None:
    """The finished samples of this round join the best of their slots, behind equals."""
    (S, C, K, T, _, top), chain, device = sizes, f["chain"], round_.at.device
    counted = torch.arange(K, device=device).unsqueeze(0) < verdict.used.unsqueeze(1)
    joins = torch.logical_and(f["finished"].index_select(0, round_.at), round_.scored).unsqueeze(1)
    fresh = torch.where(joins & counted & f["live"], round_.reward, -torch.inf).view(S, C * K)
    merged, index = torch.sort(torch.cat([f["top_reward"], fresh], 1), dim=1, descending=True, stable=True)
    merged, index = merged[:, :top], index[:, :top]
    new = torch.logical_and(index >= top, merged > -torch.inf)
    old, local = index.clamp(max=top - 1), (index - top).clamp(min=0)
    shift = torch.arange(S, device=device).unsqueeze(1)
    moved = (torch.where(new, torch.arange(top, device=device), old) + shift * top).flatten()
    f["top_source"].copy_(torch.where(new, f["position"].view(S, C * K).gather(1, local), -1 - old))
    for name, of_lane in (("top_x0", "x0_lane"), ("top_x", "x_lane")):
        latents[name].copy_(latents[name].index_select(0, moved))
        _promote(latents[name], latents[of_lane], f["top_source"].flatten())
    of_chain = torch.div(local, K, rounding_mode="floor")
    b = (of_chain + shift * C).flatten()
    last = chain[CHAIN_TRANSITION].index_select(0, b)
    here = (torch.arange(T, device=device).unsqueeze(0) == last.unsqueeze(1)).view(S, top, T)
    candidate = chain[TRIED].index_select(0, b).view(S, top) + local % K
    wide = old.unsqueeze(2).expand(S, top, T)
    for name, value in (("chain", of_chain), ("candidate", candidate)):
        kept, path = f[f"top_{name}"], f[f"path_{name}"]
        walked = torch.where(here, value.unsqueeze(2), path.index_select(0, b).view(S, top, T))
        kept.copy_(torch.where(new.unsqueeze(2), walked, kept.gather(1, wide)))
    f["top_transition"].copy_(torch.where(new, last.view(S, top), f["top_transition"].gather(1, old)))
    f["top_reward"].copy_(merged)


def _settle(f: dict[str, Tensor], sizes: Sizes, round_: _Round, verdict: _Verdict) -> None:
    """Takes the step, counts what was spent, and clears what the round needed."""
    (S, C, K, T, _, _), (winner, advance, used) = sizes, verdict
    chain, score, slot, live, at, device = f["chain"], f["score"], f["slot"], f["live"], round_.at, round_.at.device
    counted = torch.logical_and(live, torch.arange(K, device=device).unsqueeze(0) < used.unsqueeze(1))
    stepped = torch.logical_or(advance == ACCEPTED, advance == SPENT)
    here = torch.arange(T, device=device).unsqueeze(0) == chain[CHAIN_TRANSITION].unsqueeze(1)
    here = torch.logical_and(here, stepped.unsqueeze(1))
    own = (torch.arange(S * C, device=device) % C).unsqueeze(1)
    f["path_chain"].copy_(torch.where(here, own, f["path_chain"]))
    f["path_candidate"].copy_(torch.where(here, chain[CHILD].unsqueeze(1), f["path_candidate"]))
    valued = torch.logical_and(stepped, round_.scored)
    score[REWARD] = torch.where(valued, score[CHILD_REWARD], score[REWARD])
    risen = torch.where(valued, score[CHILD_REWARD] - f["centre"].index_select(0, at), -torch.inf)
    score[THRESHOLD] = torch.where(risen > score[THRESHOLD], risen, score[THRESHOLD])
    score[CHILD_REWARD] = torch.where(valued, -torch.inf, score[CHILD_REWARD])
    spent, passes = live.sum(1), f["passes"].index_select(0, at)
    cost = spent * passes
    chain[ACTIVE] = torch.where(stepped, 1 - chain[ACTIVE], chain[ACTIVE])
    chain[LEFT] -= cost
    chain[TRIED] = torch.where(stepped, 0, chain[TRIED] + used)
    chain[CHAIN_TRANSITION] += stepped
    f["alive"].logical_and_(torch.logical_and(advance != DEAD, chain[CHAIN_TRANSITION] < T))
    slot[NFE] += cost.view(S, C).sum(1)
    slot[NFE_SPECULATIVE] += ((spent - used) * passes).view(S, C).sum(1)
    slot[REWARD_CALLS] += (spent * round_.scored).view(S, C).sum(1)
    slot[EVALUATIONS] += spent.view(S, C).sum(1)
    slot[NAN_REWARDS].index_add_(0, f["lane"][LANE_SLOT], round_.unsound.to(torch.int64))
    going = (f["top_reward"][:, 0] < f["slot_real"][UNTIL]).unsqueeze(1).expand(S, C).flatten()
    f["alive"].logical_and_(going)
    unvalued = torch.logical_and(live, torch.logical_not(round_.scored).unsqueeze(1))
    f["dense"].copy_(torch.where(unvalued, torch.nan, round_.reward))
    discarded = torch.logical_and(live, torch.logical_not(counted)).to(torch.int64) * DISCARDED
    wins = (torch.arange(K, device=device).unsqueeze(0) == winner.unsqueeze(1)).to(torch.int64)
    f["status"].copy_(discarded + wins * (BEST + (advance == ACCEPTED).to(torch.int64)).unsqueeze(1))
    f["broken"].fill_(False)


def check(
    rewards: Tensor,
    bias: Tensor | None,
    ints: Tensor,
    floats: Tensor,
    flags: Tensor,
    latents: dict[str, Tensor],
    slots: int,
    lanes: int,
    transitions: int,
    next_width: int,
) -> Sizes:
    """Dtypes, shapes and layout of what `reference` takes; the sizes, some of which follow from x_lane, x and top_x."""
    op, x_lane = "decide", latents["x_lane"]
    check_latents(op, "x_lane", x_lane)
    x, top_x = latents["x"], latents["top_x"]
    if slots < 1 or x.dim() != 2 or top_x.dim() != 2 or x.size(0) % (2 * slots) or top_x.size(0) % slots:
        raise OperandError(
            f"{op}: expected x (2 * slots * chains, n) and top_x (slots * top, n) of {slots} slots, got "
            f"{tuple(x.shape)} and {tuple(top_x.shape)}"
        )
    sizes = Sizes(slots, x.size(0) // 2 // slots, lanes, transitions, x_lane.size(0), top_x.size(0) // slots)
    check_buffers(op, ints, floats, flags, sizes)
    B, N, device = sizes.batch, sizes.widest, ints.device
    samples = slots * sizes.top
    counts = {"u_lane": N, "x0_lane": N, "x": 2 * B, "u": 2 * B, "top_x": samples, "top_x0": samples}
    for name, count in counts.items():
        check_operand(op, name, latents[name], x_lane.dtype, (count, x_lane.size(1)), device)
    if rewards.dim() != 1 or rewards.size(0) > N:
        raise OperandError(f"{op}: rewards must have shape (N,), N up to {N}, got {tuple(rewards.shape)}")
    check_operand(op, "rewards", rewards, torch.float32, tuple(rewards.shape), device)
    if bias is not None:
        check_operand(op, "bias", bias, torch.float32, tuple(rewards.shape), device)
    if not -1 <= next_width <= N:
        raise OperandError(f"{op}: next_width must lie in -1..{N}, got {next_width}")
    return sizes


register(
    "decide(Tensor rewards, float temperature, Tensor? bias, Tensor(a!) ints, Tensor(b!) floats, Tensor(c!) flags, "
    "Tensor x_lane, Tensor u_lane, Tensor x0_lane, Tensor(d!) x, Tensor(e!) u, Tensor(f!) top_x, Tensor(g!) top_x0, "
    "int slots, int lanes, int transitions, float margin, bool carry, int next_width) -> ()",
    reference,
)
