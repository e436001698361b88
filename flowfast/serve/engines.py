"""What a server runs its searches on: an engine in its own process, or several in processes of their own. The
application does not know which it has."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, Protocol

from flowfast.engine.request import Event, Failed, Finished
from flowfast.engine.standing import Standing
from flowfast.errors import FlowfastError, ModelError
from flowfast.serve.config import ServeConfig


class Engines(Protocol):
    """What this package uses of `flowfast.AsyncEngine`, which is one of these; see there."""

    def generate(self, prompt: str, *, looks: int = 0, **params: Any) -> AsyncGenerator[Event, None]:
        """Events of one request, the last one `Finished` or `Failed`. Who leaves early aborts it. Raises
        FlowfastError where it is not taken on."""

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names that requests may give."""

    @property
    def standing(self) -> Standing:
        """Counts; those of several engines are added up."""

    @property
    def death(self) -> FlowfastError | None:
        """Why no request will ever be taken on again; None: they may come."""

    async def drain(self, seconds: float | None = None) -> None:
        """Takes no more requests; returns when those that it has are done. What is not in time is aborted."""

    def close(self) -> None:
        """Ends it; requests that run hear `Failed`."""


@dataclass(frozen=True)
class Restarted(Event):
    """The engine that ran it has died, and it begins anew, on whichever is free: what was told of its progress does
    not count any more, and comes once more. What it will find is the same."""

    times: int
    """This one included."""


async def warm_up(engine: Engines, config: ServeConfig) -> str | None:
    """Draws once in each quality, which makes memory, graphs and compiled code. Answers the size of the pictures,
    "512x768"; None: nothing is to be drawn. Raises FlowfastError."""
    size = None
    for budget in sorted(set(config.quality.values())) if config.warm_up else ():
        async with aclosing(engine.generate(config.warm_up, budget=budget)) as events:
            async for event in events:
                if isinstance(event, Failed):
                    raise event.error
                if isinstance(event, Finished):
                    shape = tuple(event.sample.image.shape)
                    if len(shape) != 3 or shape[0] != 3:
                        raise ModelError(f"expected a model of pictures (3, H, W), got {shape}")
                    size = f"{shape[2]}x{shape[1]}"
    return size
