"""Written by csrc/write_layout.py; flowfast/ops/layout.py says what each field is. Do not edit."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

ACTIVE: tl.constexpr = tl.constexpr(0)
CHAIN_TRANSITION: tl.constexpr = tl.constexpr(1)
QUOTA: tl.constexpr = tl.constexpr(2)
LEFT: tl.constexpr = tl.constexpr(3)
TRIED: tl.constexpr = tl.constexpr(4)
CHILD: tl.constexpr = tl.constexpr(5)
CHAIN_ROWS: tl.constexpr = tl.constexpr(6)
KEY: tl.constexpr = tl.constexpr(0)
FIRST_CHAIN: tl.constexpr = tl.constexpr(1)
NFE: tl.constexpr = tl.constexpr(2)
NFE_SPECULATIVE: tl.constexpr = tl.constexpr(3)
REWARD_CALLS: tl.constexpr = tl.constexpr(4)
NAN_REWARDS: tl.constexpr = tl.constexpr(5)
EVALUATIONS: tl.constexpr = tl.constexpr(6)
SLOT_ROWS: tl.constexpr = tl.constexpr(7)
CELL: tl.constexpr = tl.constexpr(0)
LANE_SLOT: tl.constexpr = tl.constexpr(1)
LANE_TRANSITION: tl.constexpr = tl.constexpr(2)
CANDIDATE: tl.constexpr = tl.constexpr(3)
LANE_CHAIN: tl.constexpr = tl.constexpr(4)
LANE_KEY: tl.constexpr = tl.constexpr(5)
TABLE_ROW: tl.constexpr = tl.constexpr(6)
PARENT: tl.constexpr = tl.constexpr(7)
LANE_ROWS: tl.constexpr = tl.constexpr(8)
THRESHOLD: tl.constexpr = tl.constexpr(0)
BEST_CHILD: tl.constexpr = tl.constexpr(1)
CHILD_REWARD: tl.constexpr = tl.constexpr(2)
REWARD: tl.constexpr = tl.constexpr(3)
SCORE_ROWS: tl.constexpr = tl.constexpr(4)
GUIDANCE: tl.constexpr = tl.constexpr(0)
UNTIL: tl.constexpr = tl.constexpr(1)
SLOT_REAL_ROWS: tl.constexpr = tl.constexpr(2)
TIME: tl.constexpr = tl.constexpr(0)
LINEAR_TIME: tl.constexpr = tl.constexpr(1)
LANE_GUIDANCE: tl.constexpr = tl.constexpr(2)
LANE_REAL_ROWS: tl.constexpr = tl.constexpr(3)


class Sizes(NamedTuple):
    """Of one batch, as flowfast/ops/layout.py names them."""

    S: Any
    B: Any
    K: Any
    N: Any
    T: Any
    top: Any


class Fields(NamedTuple):
    """Pointers to the fields."""

    chain: Any
    slot: Any
    quota_table: Any
    path_chain: Any
    path_candidate: Any
    top_transition: Any
    top_chain: Any
    top_candidate: Any
    passes: Any
    to_end: Any
    lane: Any
    null_lane: Any
    position: Any
    status: Any
    advance: Any
    store_source: Any
    top_source: Any
    ticket: Any
    score: Any
    slot_real: Any
    top_reward: Any
    time: Any
    linear_time: Any
    centre: Any
    lane_real: Any
    image_sum: Any
    dense: Any
    alive: Any
    given: Any
    accept: Any
    finished: Any
    scored: Any
    lane_live: Any
    live: Any
    broken: Any


@triton.jit
def fields_of(ints, floats, flags, sizes):
    """Of the packed buffers."""
    S = sizes.S.to(tl.int64)
    B = sizes.B.to(tl.int64)
    K = sizes.K.to(tl.int64)
    N = sizes.N.to(tl.int64)
    T = sizes.T.to(tl.int64)
    top = sizes.top.to(tl.int64)
    chain, ints = ints, ints + ((6 * B + 1) & -2)
    slot, ints = ints, ints + ((7 * S + 1) & -2)
    quota_table, ints = ints, ints + ((B * T + 1) & -2)
    path_chain, ints = ints, ints + ((B * T + 1) & -2)
    path_candidate, ints = ints, ints + ((B * T + 1) & -2)
    top_transition, ints = ints, ints + ((S * top + 1) & -2)
    top_chain, ints = ints, ints + ((S * top * T + 1) & -2)
    top_candidate, ints = ints, ints + ((S * top * T + 1) & -2)
    passes, ints = ints, ints + ((T + 1) & -2)
    to_end, ints = ints, ints + ((T + 1 + 1) & -2)
    lane, ints = ints, ints + ((8 * N + 1) & -2)
    null_lane, ints = ints, ints + ((N + 1) & -2)
    position, ints = ints, ints + ((B * K + 1) & -2)
    status, ints = ints, ints + ((B * K + 1) & -2)
    advance, ints = ints, ints + ((B + 1) & -2)
    store_source, ints = ints, ints + ((2 * B + 1) & -2)
    top_source, ints = ints, ints + ((S * top + 1) & -2)
    ticket, ints = ints, ints + ((1 + 1) & -2)
    score, floats = floats, floats + ((4 * B + 3) & -4)
    slot_real, floats = floats, floats + ((2 * S + 3) & -4)
    top_reward, floats = floats, floats + ((S * top + 3) & -4)
    time, floats = floats, floats + ((T + 1 + 3) & -4)
    linear_time, floats = floats, floats + ((T + 1 + 3) & -4)
    centre, floats = floats, floats + ((T + 3) & -4)
    lane_real, floats = floats, floats + ((3 * N + 3) & -4)
    image_sum, floats = floats, floats + ((N + 3) & -4)
    dense, floats = floats, floats + ((B * K + 3) & -4)
    alive, flags = flags, flags + ((B + 15) & -16)
    given, flags = flags, flags + ((S + 15) & -16)
    accept, flags = flags, flags + ((T + 15) & -16)
    finished, flags = flags, flags + ((T + 15) & -16)
    scored, flags = flags, flags + ((T + 15) & -16)
    lane_live, flags = flags, flags + ((N + 15) & -16)
    live, flags = flags, flags + ((B * K + 15) & -16)
    broken, flags = flags, flags + ((N + 15) & -16)
    return Fields(
        chain, slot, quota_table, path_chain, path_candidate, top_transition, top_chain, top_candidate, passes, to_end,
        lane, null_lane, position, status, advance, store_source, top_source, ticket, score, slot_real, top_reward,
        time, linear_time, centre, lane_real, image_sum, dense, alive, given, accept, finished, scored, lane_live, live,
        broken
    )  # fmt: skip
