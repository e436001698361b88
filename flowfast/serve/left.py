"""Clients that go away, and bodies that do not come or do not end."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import Request

from flowfast.rewards.server import PATIENCE, ClientLeft, disconnect
from flowfast.serve.errors import ApiError

MOST_BYTES = 2**18
"""Of a body; a prompt of MOST_LETTERS letters takes 48,000 at most."""
T = TypeVar("T")


async def body_of(request: Request) -> bytes:
    """Raises ApiError, ClientLeft. A body of unknown length is refused unread: a million chunks of a byte would take
    half a minute of everybody's time."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    told = request.headers.get("content-length", "")
    if "transfer-encoding" in request.headers or not told.isdigit():
        raise ApiError(411, "expected Content-Length, got a body of unknown length", "length_required", unread=True)
    if len(told) > 20 or int(told) > MOST_BYTES:
        large = f"expected a body of at most {MOST_BYTES} bytes, got {told[:20]}"
        raise ApiError(413, large, "body_too_large", unread=True)
    if kind != "application/json":
        text = f"expected Content-Type: application/json, got {kind!r:.80}"
        raise ApiError(415, text, "unsupported_media_type", unread=True)
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message.get("body", b"")
                if not message.get("more_body", False):
                    return bytes(body)
    except TimeoutError:
        raise ApiError(408, f"{len(body)} bytes of the body came in {PATIENCE:g} s: send faster", "timeout") from None


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
