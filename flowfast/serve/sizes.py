"""Several sizes of pictures on one model."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from flowfast.engine.async_engine import AsyncEngine
from flowfast.engine.request import Event
from flowfast.engine.standing import Standing
from flowfast.errors import FlowfastError, OptionError
from flowfast.serve.engines import added


class Sizes:
    """An `Engines` that has an engine for each size: see `flowfast.engine.sizes.engines_of_sizes`."""

    def __init__(self, engines: dict[str, AsyncEngine]):
        self.engines = engines
        self._ids = itertools.count()

    async def generate(
        self, prompt: str, *, size: str | None = None, looks: int = 0, id: str | None = None, **params: Any
    ) -> AsyncGenerator[Event, None]:
        """size: one of them; None: the first."""
        first = next(iter(self.engines))
        engine = self.engines.get(first if size is None else size)
        if engine is None:
            raise OptionError(f"expected size {' or '.join(self.engines)}, got {size!r:.40}")
        name = str(next(self._ids)) if id is None else id  # one engine does not know the others' ids
        async with aclosing(engine.generate(prompt, looks=looks, id=name, **params)) as events:
            async for event in events:
                yield event

    @property
    def rewards(self) -> tuple[str, ...]:
        return next(iter(self.engines.values())).rewards

    @property
    def standing(self) -> Standing:
        return added(*(engine.standing for engine in self.engines.values()))

    @property
    def death(self) -> FlowfastError | None:
        return next((engine.death for engine in self.engines.values() if engine.death is not None), None)

    async def drain(self, seconds: float | None = None) -> None:
        await asyncio.gather(*(engine.drain(seconds) for engine in self.engines.values()))

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()
