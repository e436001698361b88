"""A flow as a search runs it: with its preview for a decoder, or through torch.compile."""

from __future__ import annotations

import functools
from typing import Any

import torch

from flowfast.models.answers import defaults_of
from flowfast.types import Flow


class PreviewFlow:
    """Decodes with the flow's preview; everything else is the flow's own."""

    def __init__(self, flow: Flow):
        self._flow = flow
        self.decode = defaults_of(flow).preview or flow.decode

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)


class CompiledFlow(PreviewFlow):
    """Velocity and decoder go through torch.compile: shapes never change, so each compiles once."""

    def __init__(self, flow: Flow):
        super().__init__(flow)
        self.velocity = torch.compile(flow.velocity, dynamic=False)
        self.decode = torch.compile(self.decode, dynamic=False)


compiled = functools.lru_cache(maxsize=1)(CompiledFlow)
"""The compiled form of a flow; the last one is kept, so that the next search with it starts warm."""
