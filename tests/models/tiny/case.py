from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Case:
    """A tiny pipeline; options of its adapter; what the pipeline itself is called with for the same."""

    build: Callable[[], Any]
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    negative: str = ""
    size: dict[str, int] = field(default_factory=lambda: {"height": 16, "width": 24})
    enter: Callable[[Tensor], Tensor] = lambda latents: latents
    """A flow's latents as the pipeline's call takes them."""
    leave: Callable[[Any, Tensor], Tensor] = lambda pipe, latents: latents
    """A flow's latents from the pipeline, and what it hands out as latents."""
