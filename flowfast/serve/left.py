"""Clients that go away, and bodies that do not come or do not end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from flowfast.rewards.server import PATIENCE
from flowfast.serve.errors import ApiError

MOST_BYTES = 2**18
"""Of a body; a prompt of MOST_LETTERS letters takes 48,000 at most."""
MOST_DISCARDED = 2**24
"""Of a body that is refused: a client that is cut off as it sends sees no answer."""
T = TypeVar("T")


class ClientLeft(Exception):
    """Nobody is left to answer."""


async def body_of(request: Request) -> bytes:
    """Raises ApiError, ClientLeft."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    told = request.headers.get("content-length", "")
    size = int(told) if told.isdigit() and len(told) < 20 else 0
    body = b"" if size > MOST_BYTES else await received(request, MOST_BYTES)
    if size > MOST_BYTES or len(body) > MOST_BYTES:
        await received(request, MOST_DISCARDED, keep=False)
        raise ApiError(413, f"expected a body of at most {MOST_BYTES} bytes, got more", "body_too_large")
    if kind != "application/json":
        raise ApiError(415, f"expected Content-Type: application/json, got {kind!r:.80}", "unsupported_media_type")
    return body


async def received(request: Request, most: int, keep: bool = True) -> bytes:
    """The body, or what has come of it once that is more than `most`. Raises ApiError, ClientLeft."""
    body, count = bytearray(), 0
    if getattr(request.state, "ended", False):
        return b""
    try:
        async with asyncio.timeout(PATIENCE):
            while count <= most:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                part = message.get("body", b"")
                count += len(part)
                if keep:
                    body += part
                if not message.get("more_body", False):
                    request.state.ended = True
                    break
    except TimeoutError:
        raise ApiError(408, f"{count} bytes of the body came in {PATIENCE:g} s: send faster", "timeout") from None
    return bytes(body)


async def disconnect(receive: Any) -> None:
    """Returns once the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def stopped(task: asyncio.Future[Any]) -> None:
    """Cancels it and returns once it has ended, however; being cancelled oneself is heard."""
    task.cancel()
    await asyncio.wait([task])
    if not task.cancelled():
        task.exception()  # somebody has seen it


async def unless_left(receive: Any, work: Coroutine[Any, Any, T]) -> T:
    """What `work` answers or raises; it is cancelled, and ClientLeft raised, as soon as the client leaves."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(disconnect(receive))
    try:
        await asyncio.wait([task, left], return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientLeft
    finally:
        left.cancel()
        await stopped(task)
