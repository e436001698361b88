"""Where the numbers of a search lie: three packed buffers, one a type, that `assign_lanes` and `decide` take whole.

One table says it for every implementation: this module cuts the views that Python works with, and
`python csrc/write_layout.py` writes the same table for C++ and CUDA (csrc/core/layout.h) and for Triton
(kernels/_layout.py); tests/ops/test_layout.py compares. A field starts at a multiple of 16 bytes.

S slots of C chains, B = S C; a chain proposes up to K lanes a round; N lanes in all, padding included; T transitions;
the best `top` finished samples are kept of each slot.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

BUFFERS = {"ints": torch.int64, "floats": torch.float32, "flags": torch.bool}
ALIGNMENT = 16
"""Bytes."""


class Sizes(NamedTuple):
    """Of one batch."""

    slots: int
    chains: int
    """Of a slot."""
    lanes: int
    """Most candidates of a chain in one round."""
    transitions: int
    widest: int
    """Lanes in all, padding included."""
    top: int

    @property
    def batch(self) -> int:
        """Chains in all."""
        return self.slots * self.chains


class Field(NamedTuple):
    """A row-major matrix. rows: the names of its first dimension, a quantity each; (): it has none."""

    name: str
    buffer: str
    rows: tuple[str, ...]
    shape: tuple[str, ...]
    written: bool
    """Do the ops write it?"""


CHAIN = ("active", "chain_transition", "quota", "left", "tried", "child")
SCORE = ("threshold", "best_child", "child_reward", "reward")
SLOT = ("key", "first_chain", "nfe", "nfe_speculative", "reward_calls", "nan_rewards", "evaluations")
SLOT_REAL = ("guidance", "until")
LANE = ("cell", "lane_slot", "lane_transition", "candidate", "lane_chain", "lane_key", "table_row", "parent")
LANE_REAL = ("time", "linear_time", "lane_guidance")

ACTIVE, CHAIN_TRANSITION, QUOTA, LEFT, TRIED, CHILD = range(len(CHAIN))
THRESHOLD, BEST_CHILD, CHILD_REWARD, REWARD = range(len(SCORE))
KEY, FIRST_CHAIN, NFE, NFE_SPECULATIVE, REWARD_CALLS, NAN_REWARDS, EVALUATIONS = range(len(SLOT))
GUIDANCE, UNTIL = range(len(SLOT_REAL))
CELL, LANE_SLOT, LANE_TRANSITION, CANDIDATE, LANE_CHAIN, LANE_KEY, TABLE_ROW, PARENT = range(len(LANE))
TIME, LINEAR_TIME, LANE_GUIDANCE = range(len(LANE_REAL))

FIELDS = (
    Field("chain", "ints", CHAIN, ("B",), True),
    Field("slot", "ints", SLOT, ("S",), True),
    Field("quota_table", "ints", (), ("B", "T"), False),
    Field("path_chain", "ints", (), ("B", "T"), True),
    Field("path_candidate", "ints", (), ("B", "T"), True),
    Field("top_transition", "ints", (), ("S", "top"), True),
    Field("top_chain", "ints", (), ("S", "top", "T"), True),
    Field("top_candidate", "ints", (), ("S", "top", "T"), True),
    Field("passes", "ints", (), ("T",), False),
    Field("to_end", "ints", (), ("T+1",), False),
    Field("lane", "ints", LANE, ("N",), True),
    Field("null_lane", "ints", (), ("N",), True),
    Field("position", "ints", (), ("B", "K"), True),
    Field("status", "ints", (), ("B", "K"), True),
    Field("advance", "ints", (), ("B",), True),
    Field("store_source", "ints", (), ("2B",), True),
    Field("top_source", "ints", (), ("S", "top"), True),
    Field("ticket", "ints", (), ("1",), True),
    Field("score", "floats", SCORE, ("B",), True),
    Field("slot_real", "floats", SLOT_REAL, ("S",), False),
    Field("top_reward", "floats", (), ("S", "top"), True),
    Field("time", "floats", (), ("T+1",), False),
    Field("linear_time", "floats", (), ("T+1",), False),
    Field("centre", "floats", (), ("T",), False),
    Field("lane_real", "floats", LANE_REAL, ("N",), True),
    Field("image_sum", "floats", (), ("N",), False),
    Field("dense", "floats", (), ("B", "K"), True),
    Field("alive", "flags", (), ("B",), True),
    Field("given", "flags", (), ("S",), False),
    Field("accept", "flags", (), ("T",), False),
    Field("finished", "flags", (), ("T",), False),
    Field("scored", "flags", (), ("T",), False),
    Field("lane_live", "flags", (), ("N",), True),
    Field("live", "flags", (), ("B", "K"), True),
    Field("broken", "flags", (), ("N",), True),
)


class Place(NamedTuple):
    """Of a field in its buffer, in elements."""

    offset: int
    shape: tuple[int, ...]


def places(sizes: Sizes) -> tuple[dict[str, Place], dict[str, int]]:
    """Where each field lies, and how many elements each buffer has."""
    found, ends = {}, dict.fromkeys(BUFFERS, 0)
    for field in FIELDS:
        shape = ((len(field.rows),) if field.rows else ()) + tuple(_dimension(name, sizes) for name in field.shape)
        found[field.name] = Place(ends[field.buffer], shape)
        step = ALIGNMENT // BUFFERS[field.buffer].itemsize
        ends[field.buffer] += -(-math.prod(shape) // step) * step
    return found, ends


def _dimension(name: str, sizes: Sizes) -> int:
    S, B, T = sizes.slots, sizes.batch, sizes.transitions
    named = {"S": S, "B": B, "2B": 2 * B, "K": sizes.lanes, "T": T, "T+1": T + 1, "N": sizes.widest, "top": sizes.top}
    return named.get(name, 1)


def make_buffers(sizes: Sizes, device: torch.device | None = None) -> dict[str, Tensor]:
    """The three buffers, all zero."""
    ends = places(sizes)[1]
    return {name: torch.zeros(ends[name], dtype=kind, device=device) for name, kind in BUFFERS.items()}


def views(buffers: dict[str, Tensor], sizes: Sizes) -> dict[str, Tensor]:
    """Each field as a view of its buffer."""
    return {
        field.name: buffers[field.buffer].narrow(0, place.offset, math.prod(place.shape)).view(place.shape)
        for field, place in zip(FIELDS, places(sizes)[0].values(), strict=True)
    }
