"""The ops of `torch.ops.flowfast`, as their modules register them when they are imported; what stands behind each is
chosen in flowfast/ops/backend.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple


class Op(NamedTuple):
    """One op: its schema (the same text as in csrc/ops.cpp) and the reference kernel, which writes into its outputs."""

    schema: str
    reference: Callable[..., None]


OPS: dict[str, Op] = {}


def register(schema: str, reference: Callable[..., None]) -> None:
    """Adds an op. Called once by each module of `flowfast.ops`."""
    OPS[schema.split("(", 1)[0]] = Op(schema, reference)
