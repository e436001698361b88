"""What the rewards of a round decide, for all chains at once: one launch, in which the last program does the books.

S slots of C chains, B = S C; K lanes a chain, N in all; T transitions; the operands are those of
flowfast/ops/decide.py, and csrc/core/round.h is the same in C++. A program owns a row and a run of columns. Rows b < B
copy the new best child of chain b, if there is one, from its lane into the chain's spare row of the store; rows B + s
move the new best finished samples of slot s. All of them work that out from the state as it was. Each takes a ticket
at its end; whoever takes the last one knows that nobody reads the state any more and writes what the round leaves, and
the lanes of the next round: no second launch, nobody waits. Bytes moved: the latents of new best children and finished
samples (read + write), the columns of chains and lanes.
"""

from typing import Any, NamedTuple, Optional

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._layout import (
    ACTIVE,
    BEST_CHILD,
    CELL,
    CHAIN_TRANSITION,
    CHILD,
    CHILD_REWARD,
    EVALUATIONS,
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
    fields_of,
)
from flowfast.kernels._rows import copy_row, cut, element_offset
from flowfast.kernels.assign_lanes import lay_lanes, tile

CHUNK = 2048  # elements
NONE: tl.constexpr = tl.constexpr(float("-inf"))
UNKNOWN: tl.constexpr = tl.constexpr(float("nan"))


class Rewards(NamedTuple):
    """Of the first `count` lanes, and how they are compared. bias: None without."""

    rewards: Any
    bias: Any
    count: Any
    temperature: Any
    margin: Any


class Verdict(NamedTuple):
    """Of each cell: live, its lane, unsound (NaN, broken, or an image that is not finite), its reward or NONE. Of each
    chain: is it scored, lanes that count, the lane of the new best child or -1, advance, and best_child with the new
    one."""

    live: Any
    lane: Any
    unsound: Any
    reward: Any
    scored: Any
    used: Any
    winner: Any
    advance: Any
    best_child: Any


@triton.jit
def judge(b, inside, r, f, sizes, COLUMNS: tl.constexpr):
    """The rule of rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, algorithm 1) for chains b, a vector, from
    the state as it is: accept the first child above the threshold, spend the quota. NaN loses every comparison, and so
    do ties. A child that was alone goes on whatever its reward, unless the model broke; where no score is read children
    stand with 0."""
    _, B, K, _, T, _ = sizes
    k = tl.arange(0, COLUMNS)[None, :]
    cell = b[:, None].to(tl.int64) * K + k
    live = tl.load(f.live + cell, mask=inside[:, None] & (k < K), other=0) != 0
    lane = tl.load(f.position + cell, mask=live, other=0)
    at = tl.minimum(tl.load(f.chain + (CHAIN_TRANSITION * B + b), mask=inside, other=0).to(tl.int32), T - 1)
    scored = tl.load(f.scored + at, mask=inside, other=0) != 0
    seen = live & (lane < r.count) & scored[:, None]
    reward = tl.load(r.rewards + lane, mask=seen, other=NONE)
    broken = tl.load(f.broken + lane, mask=live, other=0) != 0
    image_sum = tl.load(f.image_sum + lane, mask=seen, other=0.0)
    unsound = seen & (broken | (reward != reward) | (image_sum - image_sum != 0.0))
    reward = tl.where(unsound, NONE, reward)
    score = reward - tl.load(f.centre + at, mask=inside, other=0.0)[:, None]
    if r.bias is not None:
        score = tl.math.div_rn(score, r.temperature) + tl.load(r.bias + lane, mask=seen, other=0.0)
    score = tl.where((reward == NONE) | (score != score), NONE, score)  # NaN loses every comparison
    score = tl.where(live & (scored == 0)[:, None], tl.where(broken, NONE, 0.0), score)

    accept = (tl.load(f.accept + at, mask=inside, other=0) != 0) & scored
    threshold = tl.load(f.score + (THRESHOLD * B + b), mask=inside, other=0.0) + r.margin
    threshold = tl.where(accept, threshold, float("inf"))
    quota = tl.load(f.chain + (QUOTA * B + b), mask=inside, other=0).to(tl.int32)
    best_child = tl.load(f.score + (BEST_CHILD * B + b), mask=inside, other=0.0)
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
    tried = tl.load(f.chain + (TRIED * B + b), mask=inside, other=0)
    intact = tl.max(tl.where(seen & (k == 0) & (broken == 0), 1, 0), 1) > 0
    alone = (advance == 3) & (tried + used == 1) & intact
    winner = tl.where(alone, 0, winner)
    advance = tl.where(alone, 2, advance)
    return Verdict(live, lane, unsound, reward, scored, used, winner, advance, best_child)


@triton.jit
def _best_finished(s, below, after, r, f, sizes, CHAINS: tl.constexpr, COLUMNS: tl.constexpr):
    """Reward and cell within its slot of the best finished sample of slot s that comes behind (below, after)."""
    S, B, K, _, T, _ = sizes
    C = B // S
    best, found = tl.full((), NONE, tl.float32), tl.zeros((), tl.int32)
    for first in range(0, C, CHAINS):
        c = first + tl.arange(0, CHAINS)
        b, inside = s * C + c, c < C
        verdict = judge(b, inside, r, f, sizes, COLUMNS)
        at = tl.minimum(tl.load(f.chain + (CHAIN_TRANSITION * B + b), mask=inside, other=0).to(tl.int32), T - 1)
        finished = tl.load(f.finished + at, mask=inside, other=0) != 0
        k = tl.arange(0, COLUMNS)[None, :]
        cell = c[:, None] * K + k
        joins = verdict.live & (k < verdict.used[:, None]) & finished[:, None]
        joins = joins & ((verdict.reward < below) | ((verdict.reward == below) & (cell > after)))
        reward = tl.where(joins, verdict.reward, NONE)
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
def _book_samples(r, f, sizes, THREADS: tl.constexpr):
    """What is known of the best samples follows top_source: from the chain of a lane, or from an older place."""
    S, B, K, _, T, top = sizes
    for first in range(0, S * T, THREADS):
        e = first + tl.arange(0, THREADS)
        inside = e < S * T
        s, t = e // T, e % T
        for i in range(top):
            place = top - 1 - i  # samples only move down: nothing is overwritten that is still to be read
            to = s * top + place
            source = tl.load(f.top_source + to, mask=inside, other=0)
            fresh = inside & (source >= 0)
            moves = fresh | (inside & (source != -1 - place))
            stays = moves & (source < 0)
            older = s * top - 1 - source
            cell = tl.load(f.lane + CELL * sizes.N + source, mask=fresh, other=0).to(tl.int32)
            b, k = cell // K, cell % K
            last = tl.load(f.chain + (CHAIN_TRANSITION * B + b), mask=fresh, other=0)
            tried = tl.load(f.chain + (TRIED * B + b), mask=fresh, other=0)
            reward = tl.load(r.rewards + source, mask=fresh, other=0.0)
            chain = tl.load(f.path_chain + b * T + t, mask=fresh, other=0)
            candidate = tl.load(f.path_candidate + b * T + t, mask=fresh, other=0)
            chain = tl.where(t == last, b % (B // S), chain)
            candidate = tl.where(t == last, tried + k, candidate)
            reward = tl.where(fresh, reward, tl.load(f.top_reward + older, mask=stays, other=0.0))
            last = tl.where(fresh, last, tl.load(f.top_transition + older, mask=stays, other=0))
            chain = tl.where(fresh, chain, tl.load(f.top_chain + older * T + t, mask=stays, other=0))
            candidate = tl.where(fresh, candidate, tl.load(f.top_candidate + older * T + t, mask=stays, other=0))
            tl.debug_barrier()
            tl.store(f.top_reward + to, reward, mask=moves & (t == 0))
            tl.store(f.top_transition + to, last, mask=moves & (t == 0))
            tl.store(f.top_chain + to * T + t, chain, mask=moves)
            tl.store(f.top_candidate + to * T + t, candidate, mask=moves)


@triton.jit
def _book_chains(b, inside, r, f, sizes, CARRY: tl.constexpr, COLUMNS: tl.constexpr):
    """State of the chains b, a vector, and what their slots have spent."""
    S, B, K, _, T, top = sizes
    live, lane, unsound, reward, scored, used, winner, advance, best_child = judge(b, inside, r, f, sizes, COLUMNS)
    k = tl.arange(0, COLUMNS)[None, :]
    wins = k == winner[:, None]
    status = tl.where(wins, 1 + (advance == 1).to(tl.int64)[:, None], 0)
    status = tl.where(live & (k >= used[:, None]), 3, status)
    cell, exists = b[:, None].to(tl.int64) * K + k, inside[:, None] & (k < K)
    tl.store(f.dense + cell, tl.where(live & (scored == 0)[:, None], UNKNOWN, reward), mask=exists)
    tl.store(f.status + cell, status, mask=exists)
    tl.store(f.advance + b, advance.to(tl.int64), mask=inside)
    lane_won = tl.max(tl.where(wins, lane, -1), 1)
    reward_won = tl.max(tl.where(wins, reward, NONE), 1)
    spent = tl.sum(live.to(tl.int64), 1)
    nans = tl.sum(unsound.to(tl.int64), 1)
    C = B // S
    s = b // C
    counts = inside & (spent > 0)
    transition = tl.load(f.chain + (CHAIN_TRANSITION * B + b), mask=inside, other=0).to(tl.int32)
    at = tl.minimum(transition, T - 1)
    passes = tl.load(f.passes + at, mask=inside, other=0)
    tl.atomic_add(f.slot + (NFE * S + s), spent * passes, mask=counts, sem="relaxed")
    tl.atomic_add(f.slot + (NFE_SPECULATIVE * S + s), (spent - used) * passes, mask=counts, sem="relaxed")
    tl.atomic_add(f.slot + (REWARD_CALLS * S + s), tl.where(scored, spent, 0), mask=counts, sem="relaxed")
    tl.atomic_add(f.slot + (NAN_REWARDS * S + s), nans, mask=counts, sem="relaxed")
    tl.atomic_add(f.slot + (EVALUATIONS * S + s), spent, mask=counts, sem="relaxed")

    active = tl.load(f.chain + (ACTIVE * B + b), mask=inside, other=0).to(tl.int32)
    quota = tl.load(f.chain + (QUOTA * B + b), mask=inside, other=0) - used
    left = tl.load(f.chain + (LEFT * B + b), mask=inside, other=0)
    tried = tl.load(f.chain + (TRIED * B + b), mask=inside, other=0)
    child = tl.load(f.chain + (CHILD * B + b), mask=inside, other=0)
    threshold = tl.load(f.score + (THRESHOLD * B + b), mask=inside, other=0.0)
    child_reward = tl.load(f.score + (CHILD_REWARD * B + b), mask=inside, other=0.0)
    parent_reward = tl.load(f.score + (REWARD * B + b), mask=inside, other=0.0)
    alive = tl.load(f.alive + b, mask=inside, other=0) != 0
    best_sample = tl.load(f.top_reward + s * top, mask=inside, other=0.0)
    until = tl.load(f.slot_real + (UNTIL * S + s), mask=inside, other=0.0)
    centre = tl.load(f.centre + at, mask=inside, other=0.0)
    path = b.to(tl.int64) * T
    next_quota = tl.load(f.quota_table + path + tl.minimum(transition + 1, T - 1), mask=inside, other=0)

    won = winner >= 0
    child = tl.where(won, tried + winner, child)
    child_reward = tl.where(won & scored, reward_won, child_reward)
    stepped = (advance == 1) | (advance == 2)
    valued = stepped & scored
    quota = tl.where(stepped, quota + next_quota if CARRY else next_quota, quota)
    threshold = tl.where(valued & (child_reward - centre > threshold), child_reward - centre, threshold)
    alive = alive & (advance != 3) & (transition + stepped.to(tl.int32) < T) & (best_sample < until)
    tl.store(f.store_source + 2 * b + 1 - active, tl.where(won, lane_won, -1), mask=inside)
    tl.store(f.store_source + 2 * b + active, tl.full(active.shape, -1, tl.int64), mask=inside)
    tl.store(f.path_chain + path + transition, (b % C).to(tl.int64), mask=inside & stepped)
    tl.store(f.path_candidate + path + transition, child, mask=inside & stepped)
    tl.debug_barrier()  # threads that hold the same chain have read it before one of them writes it
    tl.store(f.chain + (ACTIVE * B + b), tl.where(stepped, 1 - active, active).to(tl.int64), mask=inside)
    tl.store(f.chain + (CHAIN_TRANSITION * B + b), transition.to(tl.int64) + stepped.to(tl.int64), mask=inside)
    tl.store(f.chain + (QUOTA * B + b), quota, mask=inside)
    tl.store(f.chain + (LEFT * B + b), left - spent * passes, mask=inside)
    tl.store(f.chain + (TRIED * B + b), tl.where(stepped, 0, tried + used), mask=inside)
    tl.store(f.chain + (CHILD * B + b), child, mask=inside)
    tl.store(f.score + (THRESHOLD * B + b), threshold, mask=inside)
    tl.store(f.score + (BEST_CHILD * B + b), tl.where(stepped, NONE, best_child), mask=inside)
    tl.store(f.score + (CHILD_REWARD * B + b), tl.where(valued, NONE, child_reward), mask=inside)
    tl.store(f.score + (REWARD * B + b), tl.where(valued, child_reward, parent_reward), mask=inside)
    tl.store(f.alive + b, alive, mask=inside)


@triton.jit
def _move_child(
    b, r, f, sizes, x_lane_ptr, u_lane_ptr, x_ptr, u_ptr, n, first, run,
    COLUMNS: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A run of chunks of the new best child of chain b, if there is one."""
    B = sizes.B
    chains = b + tl.arange(0, 1)
    verdict = judge(chains, chains < B, r, f, sizes, COLUMNS)
    wins = tl.arange(0, COLUMNS)[None, :] == verdict.winner[:, None]
    best = tl.max(tl.where(wins, verdict.lane, -1))
    if best >= 0:
        spare = 2 * b + 1 - tl.load(f.chain + (ACTIVE * B + b))
        source, target = element_offset(best, n, 0), element_offset(spare, n, 0)
        copy_row(x_lane_ptr + source, x_ptr + target, n, first, run, CHUNK, EVEN)
        copy_row(u_lane_ptr + source, u_ptr + target, n, first, run, CHUNK, EVEN)


@triton.jit
def _merge(s, r, f, sizes, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr):
    """The best finished samples of the round, one after another, with those that slot s has, behind equals: the lane
    of each place, or -1 - its older place; and how many are new."""
    S, B, K, _, _, top = sizes
    places = tl.arange(0, PLACES)
    sources = -1 - places.to(tl.int64)
    place, older, news = 0, 0, 0
    reward, cell = tl.full((), float("inf"), tl.float32), tl.full((), -1, tl.int32)
    looks = True
    while place < top:
        if looks:
            reward, cell = _best_finished(s, reward, cell, r, f, sizes, CHAINS, COLUMNS)
        looks = reward > tl.load(f.top_reward + s * top + older)
        if looks:
            lane = tl.load(f.position + s * (B // S * K) + cell)
            sources = tl.where(places == place, lane, sources)
            news += 1
        else:
            sources = tl.where(places >= place, place - older - 1 - places, sources)
            older += 1
        place = tl.where(reward == NONE, top, place + 1)  # nothing more to come: older ones in their order
    return sources, news


@triton.jit
def _move_samples(
    s, r, f, sizes, x_lane_ptr, x0_lane_ptr, top_x_ptr, top_x0_ptr, n, first, run,
    CHAINS: tl.constexpr, COLUMNS: tl.constexpr, PLACES: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """A run of chunks of the best samples of slot s, and where they come from."""
    top = sizes.top
    places = tl.arange(0, PLACES)
    sources, news = _merge(s, r, f, sizes, CHAINS, COLUMNS, PLACES)
    if first == 0:
        tl.store(f.top_source + s * top + places, sources, mask=places < top)
    if news > 0:
        for i in range(top):
            place = top - 1 - i  # from below: samples only move down
            lane = tl.sum(tl.where(places == place, sources, 0))
            if lane != -1 - place:
                to, older = s * top + place, s * top - 1 - lane
                _move(lane, x0_lane_ptr, top_x0_ptr, older, to, n, first, run, CHUNK, EVEN)
                _move(lane, x_lane_ptr, top_x_ptr, older, to, n, first, run, CHUNK, EVEN)
            tl.debug_barrier()


@triton.jit
def _keep_books(
    r, f, sizes, next_width,
    CARRY: tl.constexpr, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
):  # fmt: skip
    """What the round leaves, and the lanes of the next one, by the one program that is left."""
    B, N = sizes.B, sizes.N
    _book_samples(r, f, sizes, THREADS)
    tl.debug_barrier()
    for start in range(0, B, CHAINS):
        b = start + tl.arange(0, CHAINS)
        _book_chains(b, b < B, r, f, sizes, CARRY, COLUMNS)
    tl.debug_barrier()
    for start in range(0, N, THREADS):
        i = start + tl.arange(0, THREADS)
        tl.store(f.broken + i, tl.zeros((THREADS,), tl.int1), mask=i < N)
    if next_width >= 0:
        lay_lanes(f, sizes, next_width, CHAINS, COLUMNS, THREADS)


# One kernel, whatever the sizes of a search; n and run decide how latents are read.
@triton.jit(do_not_specialize=["next_width", "R", "S", "B", "K", "N", "T", "top"])
def _decide_kernel(
    rewards_ptr, bias_ptr, ints_ptr, floats_ptr, flags_ptr, x_lane_ptr, u_lane_ptr, x0_lane_ptr, x_ptr, u_ptr,
    top_x_ptr, top_x0_ptr, temperature, margin, next_width, R, S, B, K, N, T, top, n, run,
    CARRY: tl.constexpr, CHAINS: tl.constexpr, COLUMNS: tl.constexpr, THREADS: tl.constexpr,
    PLACES: tl.constexpr, CHUNK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    r, sizes = Rewards(rewards_ptr, bias_ptr, R, temperature, margin), Sizes(S, B, K, N, T, top)
    row = tl.program_id(0)
    first = tl.program_id(1) * run
    # The fields are found in each branch: found before, all pointers would sit in registers while rows move.
    if row < B:
        f = fields_of(ints_ptr, floats_ptr, flags_ptr, sizes)
        _move_child(row, r, f, sizes, x_lane_ptr, u_lane_ptr, x_ptr, u_ptr, n, first, run, COLUMNS, CHUNK, EVEN)
    else:
        f = fields_of(ints_ptr, floats_ptr, flags_ptr, sizes)
        _move_samples(
            row - B, r, f, sizes, x_lane_ptr, x0_lane_ptr, top_x_ptr, top_x0_ptr, n, first, run,
            CHAINS, COLUMNS, PLACES, CHUNK, EVEN,
        )  # fmt: skip

    tl.debug_barrier()
    ticket = tl.atomic_add(f.ticket, tl.full((), 1, tl.int64), sem="acq_rel", scope="gpu")
    if ticket == tl.num_programs(0) * tl.num_programs(1) - 1:
        tl.store(f.ticket, tl.zeros((), tl.int64))  # for the next launch: in this one all have drawn
        _keep_books(r, f, sizes, next_width, CARRY, CHAINS, COLUMNS, THREADS)


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
