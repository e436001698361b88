"""The one form that every error has, OpenAI's: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import asyncio
import math
from contextlib import suppress
from typing import Any

from fastapi.responses import JSONResponse
from pydantic import ValidationError
from starlette.types import Receive, Scope, Send

from flowfast import secrets
from flowfast.bounds import refused
from flowfast.engine.request import Failed
from flowfast.errors import BudgetError, DeadlineError, EngineDeadError, FlowfastError, PromptError

TYPES = {401: "authentication_error", 500: "server_error", 501: "server_error", 503: "server_error"}
LONGEST = 1000
MOST_DISCARDED, DISCARD_SECONDS = 2**22, 1.0
SOON = 1
"""Seconds after which to try again where nothing tells it."""
MOST_SECONDS = 600


class ApiError(Exception):
    """An answer that is an error."""

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, headers: dict[str, str] | None = None,
        unread: bool = False,
    ):  # fmt: skip
        """unread: the body of the request was not."""
        super().__init__(message)
        self.status, self.message, self.code, self.param, self.headers = status, message, code, param, headers or {}
        self.unread = unread

    @property
    def content(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        param = None if self.param is None else printable(self.param)[:100]
        return {
            "error": {"message": printable(self.message)[:LONGEST], "type": kind, "param": param, "code": self.code}
        }

    def response(self) -> JSONResponse:
        return (Unread if self.unread else JSONResponse)(self.content, self.status, self.headers)


class Unread(JSONResponse):
    """Sent at once; then some of the request is read: a client that is cut off as it sends sees no answer."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = [*self.raw_headers, (b"connection", b"close")]
        await send({"type": "http.response.start", "status": self.status_code, "headers": headers})
        await send({"type": "http.response.body", "body": self.body, "more_body": True})
        left = MOST_DISCARDED
        with suppress(TimeoutError):
            async with asyncio.timeout(DISCARD_SECONDS):
                while left > 0:
                    message = await receive()
                    left -= len(message.get("body", b""))
                    if not message.get("more_body", False):
                        break
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def printable(text: str) -> str:
    """Without secrets, and without what UTF-8 cannot write."""
    return secrets.hidden(text).encode("utf-8", "backslashreplace").decode()


def fault() -> ApiError:
    """What nobody thought of; it tells nothing of it."""
    return ApiError(500, "this server failed: its log says why", "internal_error")


def unavailable(message: str, code: str, seconds: int = SOON, param: str | None = None) -> ApiError:
    """503, and when to try again."""
    return ApiError(503, message, code, param, headers={"Retry-After": str(seconds)})


def late_by(error: FlowfastError, deadline: float | None) -> int | None:
    """Whole seconds that a request needs beyond its deadline: after them the same one may come in."""
    if not isinstance(error, DeadlineError) or error.seconds is None or deadline is None:
        return None
    return max(SOON, min(MOST_SECONDS, math.ceil(error.seconds - deadline)))


def wrong_fields(error: ValidationError, names: list[str]) -> ApiError:
    """The first thing that is wrong with a body. names: the fields there are."""
    first = error.errors()[0]
    param = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        message = f"unknown field {param!r:.100}: choose of {', '.join(names)}"
        return ApiError(400, message, "unknown_parameter", param)
    if first["type"] == "missing":
        return ApiError(400, f"expected the field {param!r}, got none", "missing_required_parameter", param)
    return ApiError(400, str(refused(error, "field")), "invalid_value", param)


def not_taken_on(error: FlowfastError) -> ApiError:
    """What the engine says of a request that it does not take on."""
    if isinstance(error, EngineDeadError):
        return dead(error)
    param = "prompt" if isinstance(error, PromptError) else "budget" if isinstance(error, BudgetError) else None
    return ApiError(400, str(error), "invalid_value", param)


def dead(error: FlowfastError) -> ApiError:
    return ApiError(
        500, f"the engine of this server has died, and the server must be restarted: {error}", "engine_dead"
    )


def failed(event: Failed, seconds: int, deadline: float | None = None) -> ApiError:
    """The answer to a request that ended without a picture. seconds: after which a slot may be free; deadline: of the
    request."""
    why = str(event.error)
    match event.reason:
        case "full":
            return unavailable(f"the queue of this server is full: try again in {seconds} s", "queue_full", seconds)
        case "deadline":
            return unavailable(why, "deadline", late_by(event.error, deadline) or seconds, "deadline_ms")
        case "aborted":
            return unavailable("this server shuts down: the request was aborted before its end", "shutting_down")
        case "prompt":
            return ApiError(400, why, "invalid_value", "prompt")
        case "closed":
            return dead(event.error)
    return ApiError(500, why, f"{event.reason}_failed")
