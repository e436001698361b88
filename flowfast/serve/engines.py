"""What a server runs its searches on: an engine in its own process, or several in processes of their own. The
application does not know which it has."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, fields
from itertools import product
from typing import Any, Protocol

from torch import Tensor

from flowfast.engine.request import Event, Failed, Finished
from flowfast.engine.standing import Standing
from flowfast.errors import FlowfastError, ModelError
from flowfast.serve.config import ServeConfig


class Engines(Protocol):
    """What this package uses of `flowfast.AsyncEngine`, which is one of these; see there."""

    def generate(self, prompt: str, *, looks: int = 0, **params: Any) -> AsyncGenerator[Event, None]:
        """Events of one request, the last one `Finished` or `Failed`. Who leaves early aborts it. Where a server has
        several sizes, `size` is one of them. Raises FlowfastError where it is not taken on."""

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


def added(*several: Standing) -> Standing:
    """Counts of several engines together."""
    names = [each.name for each in fields(Standing)]
    return Standing(**{name: sum(getattr(each, name) for each in several) for name in names})


async def warm_up(engine: Engines, config: ServeConfig) -> tuple[str, ...]:
    """Draws once in each size and quality, which makes memory, graphs and compiled code. Answers the sizes of its
    pictures, "512x768"; none where the model has its own and nothing is to be drawn. Raises FlowfastError."""
    drawn: dict[str, None] = {}
    budgets = sorted(set(config.quality.values())) if config.warm_up else []
    for size, budget in product(config.size or (None,), budgets):
        image = await draw(engine, config.warm_up, budget=budget, **({} if size is None else {"size": size}))
        if len(image.shape) != 3 or image.shape[0] != 3:
            raise ModelError(f"expected a model of pictures (3, H, W), got {tuple(image.shape)}")
        found = f"{image.shape[2]}x{image.shape[1]}"
        if size not in (None, found):
            raise ModelError(f"expected pictures of {size} from this model, got {found}: choose another size")
        drawn[found] = None
    return config.size or tuple(drawn)


async def draw(engine: Engines, prompt: str, **params: Any) -> Tensor:
    """The picture of one request. Raises FlowfastError."""
    async with aclosing(engine.generate(prompt, **params)) as events:
        async for event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                return event.sample.image
    raise AssertionError("the last event of a request is Finished or Failed")
