"""A flow whose velocity and decoder go through torch.compile: shapes never change, so each compiles once."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flowfast.types import Flow


class CompiledFlow:
    """Everything else is the flow's own."""

    def __init__(self, flow: Flow):
        self._flow = flow
        self.velocity = torch.compile(flow.velocity, dynamic=False)
        self.decode = torch.compile(flow.decode, dynamic=False)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)


compiled = functools.lru_cache(maxsize=1)(CompiledFlow)
"""The compiled form of a flow; the last one is kept, so that the next search with it starts warm."""
