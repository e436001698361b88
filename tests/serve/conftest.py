"""A server in this process, on a toy flow whose calls a test may hold."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image
from starlette.testclient import TestClient
from torch import Tensor

import flowfast
from flowfast.engine.engine import Engine
from flowfast.rewards.server import config_of, listen, url_of
from flowfast.serve.app import create_app
from flowfast.serve.config import ServeConfig
from flowfast.serve.serving import Serving
from tests.toys import GaussianFlow, NearTarget

PATIENCE = 20.0
SEARCH: dict[str, Any] = {"method": "svdd", "budget": 40}
PATH = "/v1/images/generations"


class Pictures(GaussianFlow):
    """Its pictures are 6 x 4; its calls wait while a test holds them, from call number `hold_at` on by themselves."""

    hold_at, calls = 0, 0

    def __init__(self) -> None:
        super().__init__((3, 4, 6))
        self.free, self.reached = threading.Event(), threading.Event()
        self.free.set()

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls == self.hold_at:
            self.free.clear()
        if not self.free.is_set():
            self.reached.set()
            assert self.free.wait(PATIENCE)
        return super().velocity(x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        return x0.sigmoid()


class Server:
    """A server and what a test wants to know of it."""

    def __init__(self, key: str | None = None, flow: Pictures | None = None, reward: Any = None, **options: Any):
        self.flow, self.inner = flow or Pictures(), None
        self.reward = reward or NearTarget()
        self.config = ServeConfig(
            **{"model": "toy", "slots": 2, "micro_batch": 4, "quality": {"low": 20, "medium": 40}, **options}
        )
        self.serving = Serving(self.config, self.make)
        self.app: FastAPI = create_app(self.serving, key)

    def make(self) -> flowfast.AsyncEngine:
        self.inner = Engine(self.flow, {"near": self.reward, "far": NearTarget()}, **self.config.engine_options)
        return flowfast.AsyncEngine(engine=self.inner)

    async def idle(self) -> None:
        """Until the engine has nothing to do."""
        engine: Any = self.serving.engine
        while engine._engine.busy or engine._work:
            await asyncio.sleep(0.002)

    @asynccontextmanager
    async def live(self) -> AsyncIterator[Server]:
        """On the loop of the test."""
        async with self.app.router.lifespan_context(self.app):
            while self.serving.phase == "loading":
                await asyncio.sleep(0.002)
            assert self.serving.failure is None
            try:
                yield self
            finally:
                self.flow.free.set()

    async def ask(self, body: Any, path: str = PATH, left: asyncio.Event | None = None) -> Answer:
        """A request by hand, whose client leaves once `left` is set."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        parts = [{"type": "http.request", "body": data, "more_body": False}]
        answer = Answer()

        async def receive() -> dict[str, Any]:
            if parts:
                return parts.pop()
            await (left or asyncio.Event()).wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            answer.messages.append(message)
            answer.came.set()

        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(data)).encode())]
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": headers, "client": None, "server": None, "scheme": "http", "http_version": "1.1",
            "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "",
        }  # fmt: skip
        await self.app(scope, receive, send)
        return answer


class Answer:
    def __init__(self) -> None:
        self.messages: list[Any] = []
        self.came = asyncio.Event()

    @property
    def status(self) -> int:
        return self.messages[0]["status"]

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.messages[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.messages)

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@contextmanager
def served(key: str | None = None, **options: Any) -> Iterator[tuple[TestClient, Server]]:
    """A server that is ready, and a client of it."""
    server = Server(key, **options)
    with TestClient(server.app, raise_server_exceptions=False) as client:
        end = time.monotonic() + PATIENCE
        while server.serving.phase == "loading" and time.monotonic() < end:
            time.sleep(0.002)
        assert server.serving.failure is None and server.serving.phase == "ready"
        yield client, server


@contextmanager
def listening(key: str | None = "the-key", **options: Any) -> Iterator[tuple[str, Server]]:
    """A server that listens, on a thread of this process, and its address."""
    one = Server(key, **options)
    place = listen("127.0.0.1", 0)
    server = uvicorn.Server(config_of(one.app, lifespan="on"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    thread.start()
    try:
        wait_for(lambda: one.serving.phase == "ready")
        yield f"{url_of(place)}/v1", one
    finally:
        one.flow.free.set()
        server.should_exit = True
        thread.join(PATIENCE)


def wait_for(condition: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def shared() -> Iterator[TestClient]:
    """One server for the tests of a file that change nothing of it."""
    with served() as (client, _):
        yield client


def in_time(work: Callable[[], Any]) -> Any:
    async def whole() -> Any:
        async with asyncio.timeout(PATIENCE):
            return await work()

    return asyncio.run(whole())


def pixels(text: str) -> np.ndarray[Any, Any]:
    """(H, W, 3) of a picture in base64."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))).convert("RGB"))


def events_of(text: str) -> list[dict[str, Any]]:
    """Of a stream, whose lines are checked."""
    found = []
    for block in text.strip().split("\n\n"):
        if not block.startswith(":"):
            name, data = block.split("\n")
            found.append(json.loads(data.removeprefix("data: ")))
            assert name == f"event: {found[-1]['type']}"
    return found
