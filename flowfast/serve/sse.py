"""Server-sent events."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from flowfast.serve.errors import ApiError, fault, unavailable
from flowfast.serve.left import ClientLeft, stopped, unless_left

log = logging.getLogger("flowfast.serve")
PING_SECONDS = 15.0
"""After so much silence a comment is sent, so that nobody between client and server takes the stream for dead."""
MOST_STREAMS = 256
Events = AsyncGenerator[dict[str, Any], None]


class Streams:
    """How many are open: one holds memory and a connection for as long as its client likes."""

    def __init__(self, most: int = MOST_STREAMS):
        self.most, self.open = most, 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Room for one. Raises ApiError."""
        if self.open >= self.most:
            raise unavailable(f"{self.open} streams are open, as many as may: try again later", "too_many_streams", 5)
        self.open += 1
        try:
            yield
        finally:
            self.open -= 1


class Stream:
    """Events as they come; one may be waited for without being taken."""

    def __init__(self, events: Events):
        self.events = events
        self.coming: asyncio.Future[dict[str, Any]] = asyncio.ensure_future(anext(events))

    async def ready(self, seconds: float) -> bool:
        """Is there one, or an end, within so many seconds?"""
        return bool((await asyncio.wait([self.coming], timeout=seconds))[0])

    async def take(self) -> dict[str, Any]:
        """Raises StopAsyncIteration at the end, and what goes wrong."""
        event = await self.coming
        self.coming = asyncio.ensure_future(anext(self.events))
        return event

    async def close(self) -> None:
        """Whoever makes the events is cancelled."""
        await stopped(self.coming)
        await self.events.aclose()


class EventStream(Response):
    """Sends events as they come; an error ends it, as an event of its own. The client that leaves ends them."""

    media_type = "text/event-stream"

    def __init__(self, stream: Stream, closed: Callable[[], None]):
        """closed: called when it is."""
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.stream, self.closed = stream, closed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            await unless_left(receive, self._send(send))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        except ClientLeft:
            return
        finally:
            self.closed()
            await self.stream.close()

    async def _send(self, send: Send) -> None:
        async def out(text: str) -> None:
            await send({"type": "http.response.body", "body": text.encode(), "more_body": True})

        while True:
            if not await self.stream.ready(PING_SECONDS):
                await out(": wait\n\n")
                continue
            try:
                event = await self.stream.take()
            except StopAsyncIteration:
                return
            except ApiError as error:
                return await out(line_of({"type": "error", **error.content}))
            except Exception:
                log.exception("a stream failed")
                return await out(line_of({"type": "error", **fault().content}))
            await out(line_of(event))


def line_of(event: dict[str, Any]) -> str:
    return f"event: {event['type']}\ndata: {json.dumps(event, allow_nan=False)}\n\n"
