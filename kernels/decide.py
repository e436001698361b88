"""What the rewards of a round decide, for all chains at once: one launch, in which the last program does the books.

S slots of C chains, B = S C; K lanes a chain, N in all; T transitions; the operands are those of
flowfast/ops/decide.py, and csrc/core/round.h is the same in C++. A program owns a row and a run of columns. Rows b < B
copy the new best child of chain b, if there is one, from its lane into the chain's spare row of the store; rows B + s
move the new best finished samples of slot s. All of them work that out from the state as it was. Each takes a ticket
at its end; whoever takes the last one knows that nobody reads the state any more and writes what the round leaves, and
the lanes of the next round: no second launch, nobody waits. Bytes moved: the latents of new best children and finished
samples (read + write), the columns of chains and lanes.
"""

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._layout import (
    ACTIVE,
    BEST_CHILD,
    CHAIN_TRANSITION,
    CHILD,
    CHILD_REWARD,
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
    flags_of,
    floats_of,
    ints_of,
)
from flowfast.kernels._rows import copy_row, cut, element_offset
from flowfast.kernels.assign_lanes import lay_lanes, tile

CHUNK = 2048  # elements
NONE: tl.constexpr = tl.constexpr(float("-inf"))
UNKNOWN: tl.constexpr = tl.constexpr(float("nan"))


@triton.jit
def judge(
    b, inside, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr, scored_ptr,
    live_ptr, position_ptr, broken_ptr, temperature, margin, R, B, K, T, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The rule of rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, algorithm 1) for chains b, a vector, from
    the state as it is: accept the first child above the threshold, spend the quota. NaN loses every comparison, and so
    do ties. A child that was alone goes on whatever its reward, unless the model broke; where no score is read children
    stand with 0.

    Of each cell: live, its lane, unsound (NaN, broken, or an image that is not finite), its reward or NONE. Of each
    chain: is it scored, lanes that count, the lane of the new best child or -1, advance, and best_child with the new
    one.
    """
    k = tl.arange(0, COLUMNS)[None, :]
    cell = b[:, None].to(tl.int64) * K + k
    live = tl.load(live_ptr + cell, mask=inside[:, None] & (k < K), other=0) != 0
    lane = tl.load(position_ptr + cell, mask=live, other=0)
    at = tl.minimum(tl.load(chain_ptr + CHAIN_TRANSITION * B + b, mask=inside, other=0), T - 1)
    scored = tl.load(scored_ptr + at, mask=inside, other=0) != 0
    seen = live & (lane < R) & scored[:, None]
    reward = tl.load(rewards_ptr + lane, mask=seen, other=NONE)
    broken = tl.load(broken_ptr + lane, mask=live, other=0) != 0
    image_sum = tl.load(image_sum_ptr + lane, mask=seen, other=0.0)
    unsound = seen & (broken | (reward != reward) | (image_sum - image_sum != 0.0))
    reward = tl.where(unsound, NONE, reward)
    score = reward - tl.load(centre_ptr + at, mask=inside, other=0.0)[:, None]
    if bias_ptr is not None:
        score = tl.math.div_rn(score, temperature) + tl.load(bias_ptr + lane, mask=seen, other=0.0)
    score = tl.where((reward == NONE) | (score != score), NONE, score)  # NaN loses every comparison
    score = tl.where(live & (scored == 0)[:, None], tl.where(broken, NONE, 0.0), score)

    accept = (tl.load(accept_ptr + at, mask=inside, other=0) != 0) & scored
    threshold = tl.load(score_ptr + THRESHOLD * B + b, mask=inside, other=0.0) + margin
    threshold = tl.where(accept, threshold, float("inf"))
    quota = tl.load(chain_ptr + QUOTA * B + b, mask=inside, other=0).to(tl.int32)
    best_child = tl.load(score_ptr + BEST_CHILD * B + b, mask=inside, other=0.0)
    ends = tl.min(tl.where(live, COLUMNS, k), 1)
    ends = tl.minimum(ends, tl.maximum(quota, 0))
    first = tl.min(tl.where((k < ends[:, None]) & (score > threshold[:, None]), k, COLUMNS), 1)
    accepted = first < COLUMNS
    used = tl.minimum(ends, first + 1)
    score = tl.where(k < used[:, None], score, NONE)
    best = tl.max(score, 1)
    better = best > best_child
    winner = tl.where(better, tl.min(tl.where(score == best[:, None], k, COLUMNS), 1), -1)
    best_child = tl.where(better, tl.max(tl.where(k == winner[:, None], score, NONE), 1), best_child)
    spent = (used > 0) & (used == quota)
    advance = tl.where(accepted, 1, tl.where(spent, tl.where(best_child == NONE, 3, 2), 0))
    tried = tl.load(chain_ptr + TRIED * B + b, mask=inside, other=0)
    intact = tl.max(tl.where(seen & (k == 0) & (broken == 0), 1, 0), 1) > 0
    alone = (advance == 3) & (tried + used == 1) & intact
    winner = tl.where(alone, 0, winner)
    advance = tl.where(alone, 2, advance)
    return live, lane, unsound, reward, scored, used, winner, advance, best_child


@triton.jit
def _best_finished(
    s, below, after, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr, finished_ptr,
    scored_ptr, live_ptr, position_ptr, broken_ptr, temperature, margin, R, S, B, K, T,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Reward and cell within its slot of the best finished sample of slot s that comes behind (below, after)."""
    C = B // S
    best, found = tl.full((), NONE, tl.float32), tl.zeros((), tl.int32)
    for first in range(0, C, CHAINS):
        c = first + tl.arange(0, CHAINS)
        b, inside = s * C + c, c < C
        live, _, _, reward, scored, used, _, _, _ = judge(
            b, inside, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr, scored_ptr,
            live_ptr, position_ptr, broken_ptr, temperature, margin, R, B, K, T, COLUMNS,
        )  # fmt: skip
        at = tl.minimum(tl.load(chain_ptr + CHAIN_TRANSITION * B + b, mask=inside, other=0), T - 1)
        finished = tl.where(scored, tl.load(finished_ptr + at, mask=inside, other=0).to(tl.int32), 0)
        k = tl.arange(0, COLUMNS)[None, :]
        cell = c[:, None] * K + k
        joins = live & (k < (used * finished)[:, None])
        joins = joins & ((reward < below) | ((reward == below) & (cell > after)))
        reward = tl.where(joins, reward, NONE)
        highest = tl.max(reward)
        if highest > best:
            best = highest
            found = tl.min(tl.where(reward == highest, cell, B * K))
    return best, found


@triton.jit
def _move(lane, lanes_ptr, top_ptr, older, to, n, first, run, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """A run of chunks of one of the best samples: from a lane, or where there is none from an older place."""
    target = top_ptr + element_offset(to, n, 0)
    if lane >= 0:
        copy_row(lanes_ptr + element_offset(lane, n, 0), target, n, first, run, CHUNK, EVEN)
    else:
        copy_row(top_ptr + element_offset(older, n, 0), target, n, first, run, CHUNK, EVEN)


@triton.jit
def _book_samples(
    rewards_ptr, chain_ptr, path_chain_ptr, path_candidate_ptr, top_reward_ptr, top_transition_ptr, top_chain_ptr,
    top_candidate_ptr, lane_ptr, top_source_ptr, S, B, K, T, top, THREADS: tl.constexpr,
):  # fmt: skip
    """What is known of the best samples follows top_source: from the chain of a lane, or from an older place."""
    for first in range(0, S * T, THREADS):
        e = first + tl.arange(0, THREADS)
        inside = e < S * T
        s, t = e // T, e % T
        for i in range(top):
            place = top - 1 - i  # samples only move down: nothing is overwritten that is still to be read
            to = s * top + place
            source = tl.load(top_source_ptr + to, mask=inside, other=0)
            fresh = inside & (source >= 0)
            moves = fresh | (inside & (source != -1 - place))
            stays = moves & (source < 0)
            older = s * top - 1 - source
            cell = tl.load(lane_ptr + source, mask=fresh, other=0).to(tl.int32)
            b, k = cell // K, cell % K
            last = tl.load(chain_ptr + CHAIN_TRANSITION * B + b, mask=fresh, other=0)
            tried = tl.load(chain_ptr + TRIED * B + b, mask=fresh, other=0)
            reward = tl.load(rewards_ptr + source, mask=fresh, other=0.0)
            chain = tl.load(path_chain_ptr + b * T + t, mask=fresh, other=0)
            candidate = tl.load(path_candidate_ptr + b * T + t, mask=fresh, other=0)
            chain = tl.where(t == last, b % (B // S), chain)
            candidate = tl.where(t == last, tried + k, candidate)
            reward = tl.where(fresh, reward, tl.load(top_reward_ptr + older, mask=stays, other=0.0))
            last = tl.where(fresh, last, tl.load(top_transition_ptr + older, mask=stays, other=0))
            chain = tl.where(fresh, chain, tl.load(top_chain_ptr + older * T + t, mask=stays, other=0))
            candidate = tl.where(fresh, candidate, tl.load(top_candidate_ptr + older * T + t, mask=stays, other=0))
            tl.debug_barrier()
            tl.store(top_reward_ptr + to, reward, mask=moves & (t == 0))
            tl.store(top_transition_ptr + to, last, mask=moves & (t == 0))
            tl.store(top_chain_ptr + to * T + t, chain, mask=moves)
            tl.store(top_candidate_ptr + to * T + t, candidate, mask=moves)


@triton.jit
def _book_chains(
    b, inside, rewards_ptr, bias_ptr, chain_ptr, score_ptr, alive_ptr, slot_ptr, slot_real_ptr, quota_table_ptr,
    passes_ptr, path_chain_ptr, path_candidate_ptr, top_reward_ptr, centre_ptr, image_sum_ptr, accept_ptr, scored_ptr,
    live_ptr, position_ptr, broken_ptr, dense_ptr, status_ptr, advance_ptr, store_source_ptr, temperature, margin,
    R, S, B, K, T, top, CARRY: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """State of the chains b, a vector, and what their slots have spent."""
    live, lane, unsound, reward, scored, used, winner, advance, best_child = judge(
        b, inside, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr, scored_ptr,
        live_ptr, position_ptr, broken_ptr, temperature, margin, R, B, K, T, COLUMNS,
    )  # fmt: skip
    k = tl.arange(0, COLUMNS)[None, :]
    wins = k == winner[:, None]
    status = tl.where(wins, 1 + (advance == 1).to(tl.int64)[:, None], 0)
    status = tl.where(live & (k >= used[:, None]), 3, status)
    cell, exists = b[:, None].to(tl.int64) * K + k, inside[:, None] & (k < K)
    tl.store(dense_ptr + cell, tl.where(live & (scored == 0)[:, None], UNKNOWN, reward), mask=exists)
    tl.store(status_ptr + cell, status, mask=exists)
    tl.store(advance_ptr + b, advance.to(tl.int64), mask=inside)
    lane_won = tl.max(tl.where(wins, lane, -1), 1)
    reward_won = tl.max(tl.where(wins, reward, NONE), 1)
    spent = tl.sum(live.to(tl.int64), 1)
    nans = tl.sum(unsound.to(tl.int64), 1)
    C = B // S
    s = b // C
    counts = inside & (spent > 0)
    transition = tl.load(chain_ptr + CHAIN_TRANSITION * B + b, mask=inside, other=0)
    at = tl.minimum(transition, T - 1)
    passes = tl.load(passes_ptr + at, mask=inside, other=0)
    tl.atomic_add(slot_ptr + NFE * S + s, spent * passes, mask=counts, sem="relaxed")
    tl.atomic_add(slot_ptr + NFE_SPECULATIVE * S + s, (spent - used) * passes, mask=counts, sem="relaxed")
    tl.atomic_add(slot_ptr + REWARD_CALLS * S + s, tl.where(scored, spent, 0), mask=counts, sem="relaxed")
    tl.atomic_add(slot_ptr + NAN_REWARDS * S + s, nans, mask=counts, sem="relaxed")

    active = tl.load(chain_ptr + ACTIVE * B + b, mask=inside, other=0)
    quota = tl.load(chain_ptr + QUOTA * B + b, mask=inside, other=0) - used
    left = tl.load(chain_ptr + LEFT * B + b, mask=inside, other=0)
    tried = tl.load(chain_ptr + TRIED * B + b, mask=inside, other=0)
    child = tl.load(chain_ptr + CHILD * B + b, mask=inside, other=0)
    threshold = tl.load(score_ptr + THRESHOLD * B + b, mask=inside, other=0.0)
    child_reward = tl.load(score_ptr + CHILD_REWARD * B + b, mask=inside, other=0.0)
    parent_reward = tl.load(score_ptr + REWARD * B + b, mask=inside, other=0.0)
    alive = tl.load(alive_ptr + b, mask=inside, other=0) != 0
    best_sample = tl.load(top_reward_ptr + s * top, mask=inside, other=0.0)
    until = tl.load(slot_real_ptr + UNTIL * S + s, mask=inside, other=0.0)
    centre = tl.load(centre_ptr + at, mask=inside, other=0.0)
    path = b.to(tl.int64) * T
    next_quota = tl.load(quota_table_ptr + path + tl.minimum(transition + 1, T - 1), mask=inside, other=0)

    won = winner >= 0
    child = tl.where(won, tried + winner, child)
    child_reward = tl.where(won & scored, reward_won, child_reward)
    stepped = (advance == 1) | (advance == 2)
    valued = stepped & scored
    quota = tl.where(stepped, quota + next_quota if CARRY else next_quota, quota)
    threshold = tl.where(valued & (child_reward - centre > threshold), child_reward - centre, threshold)
    alive = alive & (advance != 3) & (transition + stepped.to(tl.int64) < T) & (best_sample < until)
    tl.store(store_source_ptr + 2 * b + 1 - active, tl.where(won, lane_won, -1), mask=inside)
    tl.store(store_source_ptr + 2 * b + active, tl.full(active.shape, -1, tl.int64), mask=inside)
    tl.store(path_chain_ptr + path + transition, (b % C).to(tl.int64), mask=inside & stepped)
    tl.store(path_candidate_ptr + path + transition, child, mask=inside & stepped)
    tl.debug_barrier()  # threads that hold the same chain have read it before one of them writes it
    tl.store(chain_ptr + ACTIVE * B + b, tl.where(stepped, 1 - active, active), mask=inside)
    tl.store(chain_ptr + CHAIN_TRANSITION * B + b, transition + stepped.to(tl.int64), mask=inside)
    tl.store(chain_ptr + QUOTA * B + b, quota, mask=inside)
    tl.store(chain_ptr + LEFT * B + b, left - spent, mask=inside)
    tl.store(chain_ptr + TRIED * B + b, tl.where(stepped, 0, tried + used), mask=inside)
    tl.store(chain_ptr + CHILD * B + b, child, mask=inside)
    tl.store(score_ptr + THRESHOLD * B + b, threshold, mask=inside)
    tl.store(score_ptr + BEST_CHILD * B + b, tl.where(stepped, NONE, best_child), mask=inside)
    tl.store(score_ptr + CHILD_REWARD * B + b, tl.where(valued, NONE, child_reward), mask=inside)
    tl.store(score_ptr + REWARD * B + b, tl.where(valued, child_reward, parent_reward), mask=inside)
    tl.store(alive_ptr + b, alive, mask=inside)


# One kernel, whatever the sizes of a search; n and run decide how latents are read.
@triton.jit(do_not_specialize=["next_width", "R", "S", "B", "K", "N", "T", "top"])
def _decide_kernel(
    rewards_ptr, bias_ptr, ints_ptr, floats_ptr, flags_ptr, x_lane_ptr, u_lane_ptr, x0_lane_ptr, x_ptr, u_ptr,
    top_x_ptr, top_x0_ptr, temperature, margin, next_width, R, S, B, K, N, T, top, n, run,
    CARRY: tl.constexpr, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    (
        chain_ptr, slot_ptr, quota_table_ptr, path_chain_ptr, path_candidate_ptr, top_transition_ptr, top_chain_ptr,
        top_candidate_ptr, passes_ptr, lane_ptr, position_ptr, status_ptr, advance_ptr, store_source_ptr,
        top_source_ptr, ticket_ptr,
    ) = ints_of(ints_ptr, S, B, K, N, T, top)  # fmt: skip
    (
        score_ptr, slot_real_ptr, top_reward_ptr, time_ptr, linear_time_ptr, centre_ptr, lane_real_ptr, image_sum_ptr,
        dense_ptr,
    ) = floats_of(floats_ptr, S, B, K, N, T, top)  # fmt: skip
    (
        alive_ptr, given_ptr, accept_ptr, finished_ptr, scored_ptr, lane_live_ptr, live_ptr, broken_ptr,
    ) = flags_of(flags_ptr, S, B, K, N, T, top)  # fmt: skip
    row = tl.program_id(0)
    first = tl.program_id(1) * run
    if row < B:
        b = row + tl.arange(0, 1)
        _, lane, _, _, _, _, winner, _, _ = judge(
            b, b < B, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr, scored_ptr,
            live_ptr, position_ptr, broken_ptr, temperature, margin, R, B, K, T, COLUMNS,
        )  # fmt: skip
        wins = tl.arange(0, COLUMNS)[None, :] == winner[:, None]
        best = tl.max(tl.where(wins, lane, -1))
        if best >= 0:
            spare = 2 * row + 1 - tl.load(chain_ptr + ACTIVE * B + row)
            source, target = element_offset(best, n, 0), element_offset(spare, n, 0)
            copy_row(x_lane_ptr + source, x_ptr + target, n, first, run, CHUNK, EVEN)
            copy_row(u_lane_ptr + source, u_ptr + target, n, first, run, CHUNK, EVEN)
    else:
        # Merge: the best finished samples of the round, one after another, with those that the slot has, behind equals.
        s = row - B
        places = tl.arange(0, PLACES)
        sources = -1 - places.to(tl.int64)  # a lane, or -1 - the older place
        place, older, news = 0, 0, 0
        reward, cell = tl.full((), float("inf"), tl.float32), tl.full((), -1, tl.int32)
        looks = True
        while place < top:
            if looks:
                reward, cell = _best_finished(
                    s, reward, cell, rewards_ptr, bias_ptr, chain_ptr, score_ptr, centre_ptr, image_sum_ptr, accept_ptr,
                    finished_ptr, scored_ptr, live_ptr, position_ptr, broken_ptr, temperature, margin, R, S, B, K, T,
                    CHAINS, COLUMNS,
                )  # fmt: skip
            looks = reward > tl.load(top_reward_ptr + s * top + older)
            if looks:
                lane = tl.load(position_ptr + s * (B // S * K) + cell)
                sources = tl.where(places == place, lane, sources)
                news += 1
            else:
                sources = tl.where(places >= place, place - older - 1 - places, sources)
                older += 1
            place = tl.where(reward == NONE, top, place + 1)  # nothing more to come: older ones in their order
        if first == 0:
            tl.store(top_source_ptr + s * top + places, sources, mask=places < top)
        if news > 0:
            for i in range(top):
                place = top - 1 - i  # from below: samples only move down
                lane = tl.sum(tl.where(places == place, sources, 0))
                if lane != -1 - place:
                    to, from_older = s * top + place, s * top - 1 - lane
                    _move(lane, x0_lane_ptr, top_x0_ptr, from_older, to, n, first, run, CHUNK, EVEN)
                    _move(lane, x_lane_ptr, top_x_ptr, from_older, to, n, first, run, CHUNK, EVEN)
                tl.debug_barrier()

    tl.debug_barrier()
    ticket = tl.atomic_add(ticket_ptr, tl.full((), 1, tl.int64), sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(ticket_ptr, tl.zeros((), tl.int64))  # for the next launch: in this one all have drawn
        _book_samples(
            rewards_ptr, chain_ptr, path_chain_ptr, path_candidate_ptr, top_reward_ptr, top_transition_ptr,
            top_chain_ptr, top_candidate_ptr, lane_ptr, top_source_ptr, S, B, K, T, top, THREADS,
        )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, B, CHAINS):
            b = start + tl.arange(0, CHAINS)
            _book_chains(
                b, b < B, rewards_ptr, bias_ptr, chain_ptr, score_ptr, alive_ptr, slot_ptr, slot_real_ptr,
                quota_table_ptr, passes_ptr, path_chain_ptr, path_candidate_ptr, top_reward_ptr, centre_ptr,
                image_sum_ptr, accept_ptr, scored_ptr, live_ptr, position_ptr, broken_ptr, dense_ptr, status_ptr,
                advance_ptr, store_source_ptr, temperature, margin, R, S, B, K, T, top, CARRY, COLUMNS,
            )  # fmt: skip
        tl.debug_barrier()
        for start in range(0, N, THREADS):
            i = start + tl.arange(0, THREADS)
            tl.store(broken_ptr + i, tl.zeros((THREADS,), tl.int1), mask=i < N)
        if next_width >= 0:
            lay_lanes(
                chain_ptr, alive_ptr, slot_ptr, slot_real_ptr, given_ptr, scored_ptr, time_ptr, linear_time_ptr,
                lane_ptr, lane_real_ptr, lane_live_ptr, live_ptr, position_ptr, next_width, S, B, K, N, T,
                CHAINS, COLUMNS, THREADS,
            )  # fmt: skip


def decide(
    rewards: Tensor,
    temperature: float,
    bias: Optional[Tensor],
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
    """Launches the kernel; operands as the reference checks them."""
    (N, n), B, top = x_lane.shape, x.shape[0] // 2, top_x.shape[0] // slots
    chains, columns, threads = tile(lanes)
    (rows, runs), run = cut(B + slots, n, CHUNK, x.device)
    _decide_kernel[(rows, max(1, runs))](
        rewards, bias, ints, floats, flags, x_lane, u_lane, x0_lane, x, u, top_x, top_x0, float(temperature),
        float(margin), next_width, rewards.shape[0], slots, B, lanes, N, transitions, top, n, run,
        CARRY=carry, CHAINS=chains, COLUMNS=columns, THREADS=threads, PLACES=triton.next_power_of_2(top), CHUNK=CHUNK,
        EVEN=n > 0 and n % (CHUNK * run) == 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
