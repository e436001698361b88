"""A load on a running server: requests as their time comes, and how each one ended."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from flowfast.benchmark.client import Answer, Client
from flowfast.benchmark.load_config import LoadConfig
from flowfast.benchmark.run import Advance
from flowfast.engine import clock
from flowfast.errors import OptionError


@dataclass(frozen=True)
class Loaded:
    """What came of it."""

    answers: list[Answer]
    """In the order in which requests were due."""
    seconds: float
    """From the first request to the last answer."""
    before: dict[str, float]
    """GET /metrics; {}: the server has none."""
    after: dict[str, float]


async def load(config: LoadConfig, prompts: Sequence[str], key: str | None, advance: Advance) -> Loaded:
    """Sends the requests and reads all of their answers. Raises OptionError where no server is ready there."""
    requests = config.requests(prompts)
    async with Client(config.server, key, config.timeout) as client:
        status, _ = await client.get("/ready")
        if status == 503:
            raise OptionError(f"the server at {config.server} loads or drains: try again once its /ready answers 200")
        before = await client.metrics()
        begun = clock.now()
        answers = await send(client, requests, config.max_concurrency or len(requests), advance)
        seconds = clock.now() - begun
        return Loaded(answers, seconds, before, await client.metrics())


async def send(
    client: Client, requests: Sequence[tuple[float, dict[str, Any]]], at_once: int, advance: Advance
) -> list[Answer]:
    """Each request as its time comes and fewer than `at_once` are under way."""
    room, begun, done = asyncio.Semaphore(at_once), clock.now(), itertools.count(1)

    async def one(due: float, body: dict[str, Any]) -> Answer:
        try:
            sent = clock.now() - begun
            answer = await client.ask(body)
            return replace(answer, sent=sent, late=sent - due)
        finally:
            room.release()
            advance(next(done), len(requests), "requests")

    async with asyncio.TaskGroup() as group:
        tasks = []
        for due, body in requests:
            await asyncio.sleep(max(0.0, due - (clock.now() - begun)))
            await room.acquire()
            tasks.append(group.create_task(one(due, body)))
    return [task.result() for task in tasks]
