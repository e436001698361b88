"""Who may ask, and a line of log for each request."""

from __future__ import annotations

import hmac
import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from flowfast.serve.errors import ApiError, fault, printable

log = logging.getLogger("flowfast.serve")
OWN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
PROTECTED = "/v1"
"""What is below it needs the key; /health, /ready, /metrics and /docs tell nothing of requests."""


class Front:
    """Around the application: an id for each request (the client's X-Request-Id where that is a plain word), an answer
    whatever happens, and one line of JSON in the log that has no text of the request."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        given, begun = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1"), time.monotonic()
        id = given if OWN_ID.fullmatch(given) else uuid.uuid4().hex
        facts: dict[str, Any] = {"request": id, "method": scope["method"], "route": None, "status": None}
        scope.setdefault("state", {})["facts"] = facts

        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        try:
            await self.app(scope, receive, out)
        except Exception:
            log.exception("request %s failed", id)
            if facts["status"] is None:
                await fault().response()(scope, receive, out)
        finally:
            facts["route"] = getattr(scope.get("route"), "path", None)  # as the application has it; None: no such path
            log.info(json.dumps(facts | {"seconds": round(time.monotonic() - begun, 4)}))


class Keyed:
    """Lets nobody without the key below PROTECTED."""

    def __init__(self, app: ASGIApp, key: str | None = None):
        self.app, self.key = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or self.allowed(scope["path"], dict(scope["headers"]).get(b"authorization", b"")):
            return await self.app(scope, receive, send)
        text = "expected Authorization: Bearer with the API key of this server"
        refusal = ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        await refusal.response()(scope, receive, send)

    def allowed(self, path: str, authorization: bytes) -> bool:
        within = path == PROTECTED or path.startswith(f"{PROTECTED}/")
        return self.key is None or not within or hmac.compare_digest(authorization, self.key)


class Lines(logging.Formatter):
    """Each record is one line of JSON, a trace too."""

    def format(self, record: logging.LogRecord) -> str:
        text = record.getMessage()
        if record.name == log.name and record.levelno == logging.INFO:
            return text  # it is one
        facts = {"level": record.levelname.lower(), "message": printable(text)}
        if record.exc_info:
            facts["trace"] = printable(self.formatException(record.exc_info))
        return json.dumps(facts)
