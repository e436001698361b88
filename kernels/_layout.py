"""Written by csrc/write_layout.py; flowfast/ops/layout.py says what each field is. Do not edit."""

import triton
import triton.language as tl

ACTIVE: tl.constexpr = tl.constexpr(0)
CHAIN_TRANSITION: tl.constexpr = tl.constexpr(1)
QUOTA: tl.constexpr = tl.constexpr(2)
LEFT: tl.constexpr = tl.constexpr(3)
TRIED: tl.constexpr = tl.constexpr(4)
CHILD: tl.constexpr = tl.constexpr(5)
KEY: tl.constexpr = tl.constexpr(0)
NFE: tl.constexpr = tl.constexpr(1)
NFE_SPECULATIVE: tl.constexpr = tl.constexpr(2)
REWARD_CALLS: tl.constexpr = tl.constexpr(3)
NAN_REWARDS: tl.constexpr = tl.constexpr(4)
CELL: tl.constexpr = tl.constexpr(0)
LANE_SLOT: tl.constexpr = tl.constexpr(1)
LANE_TRANSITION: tl.constexpr = tl.constexpr(2)
CANDIDATE: tl.constexpr = tl.constexpr(3)
LANE_CHAIN: tl.constexpr = tl.constexpr(4)
LANE_KEY: tl.constexpr = tl.constexpr(5)
TABLE_ROW: tl.constexpr = tl.constexpr(6)
PARENT: tl.constexpr = tl.constexpr(7)
THRESHOLD: tl.constexpr = tl.constexpr(0)
BEST_CHILD: tl.constexpr = tl.constexpr(1)
CHILD_REWARD: tl.constexpr = tl.constexpr(2)
REWARD: tl.constexpr = tl.constexpr(3)
GUIDANCE: tl.constexpr = tl.constexpr(0)
UNTIL: tl.constexpr = tl.constexpr(1)
TIME: tl.constexpr = tl.constexpr(0)
LINEAR_TIME: tl.constexpr = tl.constexpr(1)
LANE_GUIDANCE: tl.constexpr = tl.constexpr(2)


@triton.jit
def ints_of(at, S, B, K, N, T, top):
    """Pointers to the fields, in their order."""
    S, B, K = S.to(tl.int64), B.to(tl.int64), K.to(tl.int64)
    N, T, top = N.to(tl.int64), T.to(tl.int64), top.to(tl.int64)
    chain = at
    at += (6 * B + 1) // 2 * 2
    slot = at
    at += (5 * S + 1) // 2 * 2
    quota_table = at
    at += (B * T + 1) // 2 * 2
    path_chain = at
    at += (B * T + 1) // 2 * 2
    path_candidate = at
    at += (B * T + 1) // 2 * 2
    top_transition = at
    at += (S * top + 1) // 2 * 2
    top_chain = at
    at += (S * top * T + 1) // 2 * 2
    top_candidate = at
    at += (S * top * T + 1) // 2 * 2
    passes = at
    at += (T + 1) // 2 * 2
    lane = at
    at += (8 * N + 1) // 2 * 2
    position = at
    at += (B * K + 1) // 2 * 2
    status = at
    at += (B * K + 1) // 2 * 2
    advance = at
    at += (B + 1) // 2 * 2
    store_source = at
    at += (2 * B + 1) // 2 * 2
    top_source = at
    at += (S * top + 1) // 2 * 2
    ticket = at
    return (
        chain,
        slot,
        quota_table,
        path_chain,
        path_candidate,
        top_transition,
        top_chain,
        top_candidate,
        passes,
        lane,
        position,
        status,
        advance,
        store_source,
        top_source,
        ticket,
    )


@triton.jit
def floats_of(at, S, B, K, N, T, top):
    """Pointers to the fields, in their order."""
    S, B, K = S.to(tl.int64), B.to(tl.int64), K.to(tl.int64)
    N, T, top = N.to(tl.int64), T.to(tl.int64), top.to(tl.int64)
    score = at
    at += (4 * B + 3) // 4 * 4
    slot_real = at
    at += (2 * S + 3) // 4 * 4
    top_reward = at
    at += (S * top + 3) // 4 * 4
    time = at
    at += (T + 1 + 3) // 4 * 4
    linear_time = at
    at += (T + 1 + 3) // 4 * 4
    centre = at
    at += (T + 3) // 4 * 4
    lane_real = at
    at += (3 * N + 3) // 4 * 4
    image_sum = at
    at += (N + 3) // 4 * 4
    dense = at
    return score, slot_real, top_reward, time, linear_time, centre, lane_real, image_sum, dense


@triton.jit
def flags_of(at, S, B, K, N, T, top):
    """Pointers to the fields, in their order."""
    S, B, K = S.to(tl.int64), B.to(tl.int64), K.to(tl.int64)
    N, T, top = N.to(tl.int64), T.to(tl.int64), top.to(tl.int64)
    alive = at
    at += (B + 15) // 16 * 16
    given = at
    at += (S + 15) // 16 * 16
    accept = at
    at += (T + 15) // 16 * 16
    finished = at
    at += (T + 15) // 16 * 16
    scored = at
    at += (T + 15) // 16 * 16
    lane_live = at
    at += (N + 15) // 16 * 16
    live = at
    at += (B * K + 15) // 16 * 16
    broken = at
    return alive, given, accept, finished, scored, lane_live, live, broken
