"""Clients that vanish, the end of a server, and an engine that dies."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from starlette.testclient import TestClient

from tests.serve.conftest import PATH, SEARCH, Pictures, Server, events_of, in_time


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_vanishes_frees_its_slots_before_the_next_model_call(stream: bool) -> None:
    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.free.clear()
            left = asyncio.Event()
            body = {"prompt": "a", **SEARCH, "n": 2, "stream": stream, "partial_images": 2}
            gone = asyncio.create_task(server.ask(body, left=left))
            await asyncio.to_thread(server.flow.reached.wait, 10)
            assert server.serving.gate.inside == 2
            seen = int(server.flow.seen)
            left.set()
            await asyncio.wait([gone], timeout=5)
            assert gone.done() and server.flow.calls == 1  # the model call is still held
            answer = gone.result()
            assert server.serving.gate.inside == 0
            assert not answer.body or stream
            server.flow.free.set()
            await server.idle()
            calls = (int(server.flow.seen) - seen) // 4
            assert calls <= 2, calls  # the round that was held, whose lanes may take two calls; 20 without the abort
            assert server.inner is not None and server.inner.core.scheduler.count == 0
            assert not list(server.inner.core.scheduler.running())
            assert 'request_failure_total{reason="aborted"} 2.0' in server.serving.metrics.text().decode()
            assert (await server.ask({"prompt": "a", **SEARCH})).status == 200

    in_time(work)


def test_a_stream_that_is_left_between_two_pictures_ends() -> None:
    async def work() -> None:
        async with Server(warm_up="").live() as server:
            left, flow = asyncio.Event(), server.flow
            flow.hold_at = 8
            body = {"prompt": "a", **SEARCH, "stream": True, "partial_images": 3}
            task = asyncio.create_task(server.ask(body, left=left))
            await asyncio.to_thread(flow.reached.wait, 10)
            await asyncio.sleep(0.05)
            left.set()
            await asyncio.wait([task], timeout=5)
            assert task.done()
            answer = task.result()
            assert server.serving.gate.inside == 0
            events = events_of(answer.body.decode())
            assert events and all(event["type"].endswith("partial_image") for event in events)
            flow.free.set()
            await server.idle()
            assert flow.calls < 12 and server.serving.gate.inside == 0

    in_time(work)


def test_it_drains() -> None:
    """What runs is answered, what comes is told so, and /ready says no from the first moment on."""

    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.free.clear()
            running = asyncio.create_task(server.ask({"prompt": "a", **SEARCH}))
            await asyncio.to_thread(server.flow.reached.wait, 10)
            draining = asyncio.create_task(server.serving.drain())
            await asyncio.sleep(0)
            assert server.serving.phase == "draining"
            refused = await server.ask({"prompt": "a", **SEARCH})
            assert refused.status == 503 and refused.json["error"]["code"] == "draining"
            assert "retry-after" in refused.headers
            server.flow.free.set()
            await draining
            assert (await running).status == 200

    in_time(work)


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_not_done_in_time_is_told_so(stream: bool) -> None:
    async def work() -> None:
        async with Server(warm_up="", drain_seconds=0.05).live() as server:
            server.flow.free.clear()
            body = {"prompt": "a", **SEARCH, "stream": stream}
            running = asyncio.create_task(server.ask(body))
            await asyncio.to_thread(server.flow.reached.wait, 10)
            draining = asyncio.create_task(server.serving.drain())
            await asyncio.sleep(0.2)
            server.flow.free.set()
            await draining
            answer = await running
            assert answer.status == 503 and answer.json["error"]["code"] == "shutting_down"

    in_time(work)


def test_ready_comes_after_loading_and_health_before() -> None:
    async def work() -> None:
        server = Server()
        server.flow.free.clear()  # the warm-up waits
        async with server.app.router.lifespan_context(server.app):
            await asyncio.to_thread(server.flow.reached.wait, 10)
            assert server.serving.phase == "loading" and server.serving.death is None
            refused = await server.ask({"prompt": "a"})
            assert refused.status == 503 and refused.json["error"]["code"] == "loading"
            server.flow.free.set()
            while server.serving.phase == "loading":
                await asyncio.sleep(0.002)
            assert server.serving.phase == "ready" and server.serving.size == "6x4"

    in_time(work)


def test_a_model_that_cannot_be_loaded_is_a_failure() -> None:
    class Broken(Pictures):
        def velocity(self, *args: Any) -> torch.Tensor:
            raise RuntimeError("no kernel")

    async def work() -> None:
        server = Server(flow=Broken())
        async with server.app.router.lifespan_context(server.app):
            while server.serving.phase == "loading":
                await asyncio.sleep(0.002)
            assert server.serving.phase == "failed" and "no kernel" in str(server.serving.failure)
            assert server.serving.death is not None

    in_time(work)


def test_an_engine_that_dies_ends_every_request_with_one_clear_500() -> None:
    """Those that run and those that wait, plain, streamed (begun or not) and searches that go on by themselves."""

    async def work() -> None:
        async with Server(warm_up="").live() as server:
            server.flow.hold_at = 8  # by then the first stream has shown something
            body = {"prompt": "a", **SEARCH}
            begun = asyncio.create_task(server.ask(body | {"stream": True, "partial_images": 3}))
            await asyncio.to_thread(server.flow.reached.wait, 10)
            tasks = [asyncio.create_task(server.ask(body | {"seed": seed})) for seed in range(3)]
            tasks += [asyncio.create_task(server.ask(body | {"stream": True}))]
            search = (await server.ask(body, "/v1/searches")).json["id"]
            follower = asyncio.create_task(collected(server.serving.records.find(search).follow()))
            await asyncio.sleep(0.05)
            assert server.inner is not None

            def fault() -> Any:
                raise KeyError("nobody's")

            server.inner.step = fault  # type: ignore[method-assign]
            server.flow.free.set()
            for answer in await asyncio.gather(*tasks):
                assert answer.status == 500 and answer.json["error"]["code"] == "engine_dead"
            *pictures, last = events_of((await begun).body.decode())
            assert pictures and all(event["type"].endswith("partial_image") for event in pictures)
            assert last["type"] == "error" and last["error"]["code"] == "engine_dead"
            assert (await follower)[-1]["error"]["code"] == "engine_dead"
            found = server.serving.records.find(search).content
            assert found["status"] == "failed" and found["error"]["code"] == "engine_dead"
            assert server.serving.death is not None
            assert server.serving.gate.inside == server.serving.streams.open == 0
            for stream in (False, True):
                assert (await server.ask(body | {"stream": stream})).status == 500

    in_time(work)


async def collected(events: Any) -> list[Any]:
    return [event async for event in events]


def test_health_of_a_dead_engine() -> None:
    server = Server(warm_up="")
    with TestClient(server.app) as client:
        while client.get("/ready").status_code != 200:
            pass
        assert server.serving.engine is not None
        server.serving.engine.close()
        assert client.get("/health").status_code == 503
        assert client.post(PATH, json={"prompt": "a", **SEARCH}).status_code == 500
