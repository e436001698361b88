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

from flowfast.serve.errors import ApiError

log = logging.getLogger("flowfast.serve")
OWN_ID = re.compile(r"[\w.-]{1,64}", re.ASCII)
PROTECTED = "/v1"
"""What is below it needs the key; /health, /ready, /metrics and /docs tell nothing of requests."""


class Front:
    """Around the application: the key, an id for each request (the client's X-Request-Id where that is a plain word),
    and one line of JSON in the log, without prompts."""

    def __init__(self, app: ASGIApp, key: str | None = None):
        self.app, self.key = app, None if key is None else f"Bearer {key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers, begun = dict(scope["headers"]), time.monotonic()
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        id = given if OWN_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = id
        facts: dict[str, Any] = {"request": id, "method": scope["method"], "path": scope["path"][:200], "status": None}

        async def out(message: Message) -> None:
            if message["type"] == "http.response.start":
                facts["status"] = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", id.encode())]
            await send(message)

        try:
            if self.allowed(scope["path"], headers.get(b"authorization", b"")):
                await self.app(scope, receive, out)
            else:
                text = "expected Authorization: Bearer with the API key of this server"
                refusal = ApiError(401, text, "invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
                await refusal.response()(scope, receive, out)
        finally:
            log.info(json.dumps(facts | {"seconds": round(time.monotonic() - begun, 4)}))

    def allowed(self, path: str, authorization: bytes) -> bool:
        within = path == PROTECTED or path.startswith(f"{PROTECTED}/")
        return self.key is None or not within or hmac.compare_digest(authorization, self.key)
