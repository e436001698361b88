"""The life of a server: it loads, it answers, it drains."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from flowfast.engine.engine import SLOTS
from flowfast.engine.standing import Standing
from flowfast.errors import EngineDeadError
from flowfast.methods import described
from flowfast.serve.config import ServeConfig
from flowfast.serve.engines import Engines, warm_up
from flowfast.serve.errors import unavailable
from flowfast.serve.fleet import Fleet
from flowfast.serve.gate import Gate
from flowfast.serve.metrics import Metrics
from flowfast.serve.records import Records
from flowfast.serve.searches import Searches
from flowfast.serve.sse import Streams
from flowfast.serve.worker import engine_of
from flowfast.version import __version__

log = logging.getLogger("flowfast.serve")


class Serving:
    """What all requests share.

    Args:
        config: the server's.
        make: makes an engine in this process, off the event loop; default: what the configuration says.
    """

    def __init__(self, config: ServeConfig, make: Callable[[], Engines] | None = None):
        self.config, self.make = config, make
        self.engine: Engines | None = None
        self.metrics = Metrics()
        self.gate = Gate((config.slots or SLOTS) * config.count + config.queue, self.metrics.full)
        self.records, self.streams = Records(), Streams()
        self.metrics.watch(self._standing)
        self.created = int(time.time())
        self.phase = "loading"
        """loading, ready, draining or failed."""
        self.sizes: tuple[str, ...] = ()
        """Of its pictures, the first one where none is asked for; none where that is not known yet."""
        self.failure: BaseException | None = None
        self.on_loaded: Callable[[], None] = lambda: None
        """Called once it is ready, or has failed."""

    def _standing(self) -> Standing | None:
        return None if self.engine is None else self.engine.standing

    @property
    def size(self) -> str | None:
        """Of pictures for which none is asked, where it is known."""
        return self.sizes[0] if self.sizes else None

    @property
    def death(self) -> BaseException | None:
        """Why it will never answer again; None: it may."""
        return self.failure or (None if self.engine is None else self.engine.death)

    def searches(self) -> Searches:
        """What a request needs. Raises ApiError where none is taken now."""
        if self.phase != "ready" or self.engine is None:
            raise unavailable(f"this server is {self.phase}: try again later", self.phase, 5)
        return Searches(self.engine, self.gate, self.metrics)

    @property
    def offer(self) -> dict[str, Any]:
        """What GET /v1/info answers."""
        config, standing = self.config, self._standing()
        return {
            "object": "info", "version": __version__, "status": self.phase, "models": list(config.models),
            "size": self.size, "methods": described(), "rewards": [] if self.engine is None else self.engine.rewards,
            "qualities": config.quality, "budget": config.budget_of("auto"), "max_budget": config.largest_budget,
            "slots": (config.slots or SLOTS) * config.count, "running": standing.running if standing else 0,
            "waiting": standing.waiting if standing else 0, "room": self.gate.most - self.gate.inside,
            "prompt": config.warm_up,
        }  # fmt: skip

    # ---- loading ----

    async def load(self) -> None:
        """Makes the engine and draws once in each quality; then requests may come."""
        try:
            if self.make is None and self.config.apart:
                await self._start(Fleet(self.config))
            else:
                engine = await in_thread(self.make or partial(engine_of, self.config))
                if self.phase == "draining":
                    engine.close()
                    return
                self.engine = engine
                self.sizes = await warm_up(engine, self.config)
            self.phase = "ready" if self.phase == "loading" else self.phase
        except Exception as error:
            if self.phase != "draining":
                self.failure, self.phase = error, "failed"
        self.on_loaded()

    async def _start(self, fleet: Fleet) -> None:
        self.engine = fleet
        self.metrics.watch_fleet(fleet)
        self.sizes = await fleet.start()

    # ---- its end ----

    def stop_admitting(self) -> None:
        """From here on /ready says no, and no request is taken on."""
        self.phase = "draining"

    async def drain(self) -> None:
        """Returns when all that was taken on has ended; what has not in time is aborted."""
        self.stop_admitting()
        if self.engine is not None:
            try:
                await self.engine.drain(self.config.drain_seconds)
            except EngineDeadError:
                return

    async def close(self) -> None:
        self.stop_admitting()
        await self.records.end()
        if self.engine is not None:
            await asyncio.to_thread(self.engine.close)


async def in_thread(work: Callable[[], Any]) -> Any:
    """As `asyncio.to_thread`, but the end of the process does not wait for it."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Any] = loop.create_future()

    def tell(give: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            give(value)

    def run() -> None:
        give: Callable[[Any], None] = future.set_result
        try:
            value = work()
        except BaseException as error:
            value, give = error, future.set_exception
        if not loop.is_closed():
            loop.call_soon_threadsafe(tell, give, value)

    threading.Thread(target=run, name="flowfast loading", daemon=True).start()
    return await future
