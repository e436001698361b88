"""The crowd of bench/e2e/serve_load.py, short: a server as a process of its own, whose clients vanish or stream."""

from __future__ import annotations

import asyncio
from typing import Any

from bench.e2e.serve_load import body_of, crowd, idle, silent, started
from flowfast.benchmark.client import Client
from flowfast.benchmark.load import send

CLIENTS, SECONDS, SLOTS, QUEUE = 16, 10.0, 6, 6


def test_each_request_has_one_end_and_nothing_stays() -> None:
    async def work() -> dict[str, Any]:
        with started("--queue", str(QUEUE), slots=SLOTS) as server:
            found = await crowd(server, CLIENTS, SECONDS)
            async with Client(server.url) as client:  # no place of those that vanished is still taken
                full = [(0.0, body_of(at)) for at in range(SLOTS + QUEUE)]
                found["after"] = [answer.kind for answer in await send(client, full, len(full), silent)]
                await idle(client)
            return found

    found = asyncio.run(work())
    ends = found["ends"]
    assert set(ends) <= {"ok", "queue_full", "vanished"} and sum(ends.values()) == found["requests"], ends
    assert min(ends[name] for name in ("ok", "queue_full", "vanished")) > 0, ends
    assert set(found["log_lines_each"]) == {"1"}, found["log_lines_each"]
    assert set(found["log_lines_each_that_vanished"]) <= {"0", "1"}
    assert found["files_more"] <= 0
    assert found["after"] == ["ok"] * (SLOTS + QUEUE)
