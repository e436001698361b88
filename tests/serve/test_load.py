"""Many clients at once, of whom some vanish and some stream: each gets exactly one end, and nothing is left behind."""

from __future__ import annotations

import asyncio
import logging
import random
import tracemalloc
from collections import Counter
from typing import Any

import pytest

from tests.serve.conftest import SEARCH, Answer, Server, events_of, in_time

CLIENTS, REQUESTS, QUEUE = 24, 240, 8


async def one(server: Server, rng: random.Random, seen: Counter[str], pictures: dict[int, set[str]]) -> None:
    """A request of one of twelve seeds; a fifth vanish, a tenth stream."""
    seed, kind = rng.randrange(12), rng.random()
    body: dict[str, Any] = {"prompt": "a", **SEARCH, "seed": seed, "n": rng.choice((1, 1, 1, 2))}
    if kind < 0.1:
        body |= {"stream": True, "partial_images": rng.randrange(4)}
    left = asyncio.Event()
    if kind > 0.8:
        asyncio.get_running_loop().call_later(rng.random() * 0.03, left.set)
    answer = await server.ask(body, left=left)
    end = end_of(answer, body)
    if left.is_set() and end == "none":
        end = "vanished"
    seen[end] += 1
    if end == "pictures" and "stream" not in body:
        pictures.setdefault(seed, set()).add(answer.json["data"][0]["b64_json"])
    if end == "queue_full":
        await asyncio.sleep(0.02)


def end_of(answer: Answer, body: dict[str, Any]) -> str:
    """What a client that stays makes of it; fails where there are two ends, or half of one."""
    starts = [message for message in answer.messages if message["type"] == "http.response.start"]
    assert len(starts) <= 1
    last = [message for message in answer.messages if not message.get("more_body", False)][len(starts) :]
    assert len(last) <= 1
    if not starts or not answer.body or not last:
        return "none"
    if answer.status != 200:
        return str(answer.json["error"]["code"])
    if "stream" in body:
        done = [event for event in events_of(answer.body.decode()) if event["type"].endswith("completed")]
        assert len(done) == body["n"]
    return "pictures"


@pytest.mark.parametrize("seed", [0, 1])
def test_each_request_has_one_end_and_nothing_stays(seed: int) -> None:
    async def work() -> None:
        async with Server(queue=QUEUE, warm_up="").live() as server:
            rng, seen, pictures = random.Random(seed), Counter[str](), dict[int, set[str]]()

            async def client(requests: int) -> None:
                for _ in range(requests):
                    await one(server, rng, seen, pictures)

            await asyncio.gather(*(client(REQUESTS // CLIENTS) for _ in range(CLIENTS)))
            await server.idle()
            assert seen.total() == REQUESTS and set(seen) <= {"pictures", "queue_full", "vanished"}
            assert min(seen.values()) > 5, seen  # all three happened
            assert all(len(found) == 1 for found in pictures.values()) and len(pictures) > 5
            assert server.serving.gate.inside == 0
            engine: Any = server.serving.engine
            assert not engine._listeners and not server.inner._jobs  # type: ignore[union-attr]
            assert engine.standing.running == engine.standing.waiting == 0

    in_time(work)


def test_memory_does_not_grow_with_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kibibyte a request at most, once warm."""
    monkeypatch.setattr(logging.getLogger("flowfast.serve"), "disabled", True)  # pytest keeps all lines of a test

    async def work() -> None:
        async with Server(warm_up="").live() as server:

            async def some(count: int) -> None:
                for seed in range(count):
                    body = {"prompt": "a", "method": "svdd", "budget": 20, "seed": seed % 7}
                    assert (await server.ask(body)).status == 200

            await some(60)
            tracemalloc.start()
            try:
                await some(20)
                before = tracemalloc.get_traced_memory()[0]
                await some(100)
                grown = tracemalloc.get_traced_memory()[0] - before
            finally:
                tracemalloc.stop()
            assert grown < 100 * 1024, grown

    in_time(work)
