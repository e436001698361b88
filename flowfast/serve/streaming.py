"""A request whose answer is a stream: partial images, then the pictures, as OpenAI's API names them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any

from flowfast.engine.request import Event, Found, Partial
from flowfast.serve import pictures
from flowfast.serve.engines import Restarted
from flowfast.serve.left import stopped
from flowfast.serve.metrics import Metrics
from flowfast.serve.searches import Asked, number, usage_of

Tell = Callable[[dict[str, Any]], None]


class Streaming:
    """A `Watcher` that tells the events of the stream."""

    def __init__(self, asked: Asked, metrics: Metrics, tell: Tell):
        self.asked, self.metrics, self.tell, self.begun = asked, metrics, tell, time.monotonic()
        self.looks = asked.request.partial_images
        self.best: dict[int, float] = {}
        self.sent: Counter[int] = Counter()
        self.restarted: dict[int, int] = {}

    async def hear(self, index: int, event: Event) -> None:
        if isinstance(event, Found):
            self.best[index] = event.reward
        if isinstance(event, Restarted):
            self.restarted[index] = event.times
            self.best.pop(index, None)
        if isinstance(event, Partial):
            await self._partial(index, event)

    async def _partial(self, index: int, event: Partial) -> None:
        request = self.asked.request
        form = (request.output_format, request.output_compression)
        text = await pictures.told(event.image, *form)
        if self.sent[index] == 0:
            self.metrics.first_partial(time.monotonic() - self.begun)
        best, budget = number(self.best.get(index)), self.asked.params["budget"]
        facts = {"index": index, "nfe": event.nfe, "budget": budget, "best_reward": best}
        if index in self.restarted:
            facts["restarted"] = self.restarted[index]
        entry = {"b64_json": text, "size": pictures.size_of(event.image), "partial_image_index": self.sent[index]}
        self.sent[index] += 1
        self._tell("partial_image", entry | {"flowfast": facts})

    def done(self, index: int, entries: list[dict[str, Any]]) -> None:
        for entry in entries:
            self._tell("completed", entry | {"usage": usage_of([entry["flowfast"]["nfe"]])})

    def _tell(self, kind: str, entry: dict[str, Any]) -> None:
        self.tell({
            "type": f"image_generation.{kind}", "created_at": int(time.time()), "quality": self.asked.quality,
            "background": "opaque", "output_format": self.asked.request.output_format, **entry,
        })  # fmt: skip


async def streamed(work: Callable[[Tell], Awaitable[Any]]) -> AsyncGenerator[dict[str, Any], None]:
    """What `work` tells, as it tells it. Raises what it raises; it is cancelled where nobody asks for more."""
    events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

    async def whole() -> None:
        try:
            await work(events.put_nowait)
        finally:
            events.put_nowait(None)

    task = asyncio.ensure_future(whole())
    try:
        while (event := await events.get()) is not None:
            yield event
        await task
    finally:
        await stopped(task)
