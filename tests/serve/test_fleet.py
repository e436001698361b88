"""Several engines behind one port: real processes on a toy flow. Who gets what is tests/serve/test_routing.py."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import threading
import time
import urllib.request
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import flowfast
from flowfast.errors import EngineDeadError, OptionError
from flowfast.rewards.pixels import to_pixels
from flowfast.serve import serving as life
from flowfast.serve.app import create_app
from flowfast.serve.config import ServeConfig
from flowfast.serve.fleet import Fleet, Seat
from flowfast.serve.serving import Serving
from flowfast.serve.worker import engine_of
from tests.serve import slow_engine
from tests.serve.conftest import PATH, SEARCH, events_of, pixels
from tests.serve.test_command import KEY, PROMPT, process
from tests.toys import NearTarget

PATIENCE = 120.0
"""Seconds: a process takes four to start, and twenty on a machine with much else to do."""
OPTIONS: dict[str, Any] = {
    "model": "toy", "engines": 2, "slots": 2, "micro_batch": 4, "queue": 4, "warm_up": "a", "threads": 1,
    "quality": {"low": 20, "medium": 40},
}  # fmt: skip


class Server:
    def __init__(self, client: TestClient, serving: Serving):
        self.client, self.serving = client, serving
        assert isinstance(serving.engine, Fleet)
        self.fleet = serving.engine

    def whole(self) -> Server:
        """With all engines up."""
        until(lambda: all(seat.up for seat in self.fleet.seats))
        return self

    @property
    def busy(self) -> Seat:
        (seat,) = {request.seat for request in self.fleet._open.values()}
        assert seat is not None
        return seat


def until(holds: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(life, "Fleet", partial(Fleet, make=slow_engine.make))
        serving = Serving(ServeConfig(**OPTIONS))
        with TestClient(create_app(serving), raise_server_exceptions=False) as client:
            until(lambda: serving.phase != "loading")
            assert serving.failure is None
            yield Server(client, serving)


@pytest.fixture
def server(fleet: Server) -> Server:
    return fleet.whole()


def ask(server: Server, **fields: Any) -> dict[str, Any]:
    answer = server.client.post(PATH, json={"prompt": "a", **SEARCH, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def expected(**options: Any) -> np.ndarray[Any, Any]:
    found = flowfast.search(slow_engine.Slow(), ["a"], reward=NearTarget(), micro_batch=4, **{**SEARCH, **options})
    return to_pixels(found.samples[0].image[None])[0].permute(1, 2, 0).numpy()


def kill(seat: Seat) -> None:
    assert seat.child is not None and seat.child.process.pid is not None
    os.kill(seat.child.process.pid, signal.SIGKILL)


# ---- as one engine ----


def test_the_pictures_are_those_of_flowfast_search_on_every_engine(server: Server) -> None:
    before = [seat.now.rows for seat in server.fleet.seats]
    answer = ask(server, seed=3, n=4)
    assert answer["size"] == "6x4" and server.serving.size == "6x4"
    for index, entry in enumerate(answer["data"]):
        assert np.array_equal(pixels(entry["b64_json"]), expected(seed=3, repeat=index))
        assert "restarted" not in entry["flowfast"]
    assert all(seat.now.rows > rows for seat, rows in zip(server.fleet.seats, before, strict=True))


def test_a_stream_has_its_partial_images(server: Server) -> None:
    answer = server.client.post(PATH, json={"prompt": "a", **SEARCH, "stream": True, "partial_images": 3})
    events = events_of(answer.text)
    assert [event.get("partial_image_index") for event in events] == [0, 1, 2, None]
    assert np.array_equal(pixels(events[-1]["b64_json"]), expected())


def test_what_is_refused_is_refused_as_by_one_engine(server: Server) -> None:
    answer = server.client.post(PATH, json={"prompt": "a", "method": "none"})
    assert answer.status_code == 400 and "unknown method 'none'" in answer.text
    answer = server.client.post(PATH, json={"prompt": "a", **SEARCH, "reward": "nowhere"})
    assert answer.status_code == 400 and "near or far" in answer.text


def test_a_deadline_is_kept_or_refused(server: Server) -> None:
    ask(server)  # it knows its pace
    (entry,) = ask(server, deadline_ms=86_400_000)["data"]
    assert entry["flowfast"]["stopped"] == "budget"
    answer = server.client.post(PATH, json={"prompt": "a", **SEARCH, "deadline_ms": 1})
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "deadline"


def test_the_queue_bounds_the_whole(server: Server) -> None:
    answer = server.client.post(PATH, json={"prompt": "a", **SEARCH, "n": 9})  # 2 x 2 slots and 4 that wait
    assert answer.status_code == 503 and answer.json()["error"]["code"] == "queue_full"
    assert len(ask(server, n=8)["data"]) == 8


def test_who_leaves_frees_the_slots(server: Server) -> None:
    id = server.client.post("/v1/searches", json={"prompt": "a", **SEARCH, "n": 4}).json()["id"]
    until(lambda: server.fleet.standing.running == 4)
    assert server.client.delete(f"/v1/searches/{id}").status_code == 200
    assert not server.fleet._open
    until(lambda: server.fleet.standing.running == server.fleet.standing.waiting == 0)
    assert server.serving.gate.inside == 0


def test_metrics_are_sums(server: Server) -> None:
    ask(server)
    text = server.client.get("/metrics").text
    assert 'flowfast:engine_up{engine="0"} 1.0' in text and 'flowfast:engine_up{engine="1"} 1.0' in text
    rows = sum(seat.now.rows + seat.past.rows for seat in server.fleet.seats)
    assert f"flowfast:rows_total {float(rows)}" in text


# ---- engines that die ----


def test_a_killed_engine_costs_time_and_a_stream_is_told(server: Server) -> None:
    found: list[Any] = []
    body = {"prompt": "a", **SEARCH, "seed": 5, "stream": True, "partial_images": 3}
    asking = threading.Thread(target=lambda: found.append(server.client.post(PATH, json=body)))
    before, rows = [seat.restarts for seat in server.fleet.seats], server.fleet.standing.rows
    asking.start()
    until(lambda: server.serving.metrics.text().count(b"time_to_first_partial_seconds_count 0.0") == 0)
    until(lambda: any(request.left < 20 for request in server.fleet._open.values()))
    seat = server.busy
    kill(seat)
    asking.join(PATIENCE)
    events = events_of(found[0].text)
    partial = events[:-1]
    assert [event["partial_image_index"] for event in partial] == list(range(len(partial))) and len(partial) > 3
    again = [event for event in partial if event["flowfast"].get("restarted")]
    assert len(again) == 3 and all(event["flowfast"]["restarted"] == 1 for event in again)
    assert events[-1]["type"] == "image_generation.completed" and events[-1]["flowfast"]["restarted"] == 1
    assert np.array_equal(pixels(events[-1]["b64_json"]), expected(seed=5))
    server.whole()
    assert seat.restarts == before[seat.number] + 1 and server.fleet.standing.rows > rows
    text = server.client.get("/metrics").text
    assert f'engine_restarts_total{{engine="{seat.number}"}} {float(seat.restarts)}' in text


def test_a_search_is_told_and_so_is_an_engine_whose_thread_died(server: Server) -> None:
    """The prompt is fatal to the engine that gets it: one that runs there beside it begins anew."""
    id = server.client.post("/v1/searches", json={"prompt": "a", **SEARCH, "n": 2, "seed": 6}).json()["id"]
    until(lambda: server.fleet.standing.running == 2)
    fatal = server.client.post("/v1/searches", json={"prompt": "thread", **SEARCH}).json()["id"]
    until(lambda: any(request.starts > 1 for request in server.fleet._open.values()))
    server.client.delete(f"/v1/searches/{fatal}")
    until(lambda: server.client.get(f"/v1/searches/{id}").json()["status"] == "finished")
    result = server.client.get(f"/v1/searches/{id}").json()["result"]
    for index, entry in enumerate(result["data"]):
        assert np.array_equal(pixels(entry["b64_json"]), expected(seed=6, repeat=index))
    events = events_of(server.client.get(f"/v1/searches/{id}/events").text)
    assert {"search.restarted"} < {event["type"] for event in events}
    assert server.serving.death is None


def test_an_engine_that_cannot_start_is_one_clear_error() -> None:
    async def work(make: Any) -> None:
        await Fleet(ServeConfig(**{**OPTIONS, "engines": None, "devices": ["cpu"]}), make=make).start()

    with pytest.raises(OptionError, match="unknown model 'toy'"):
        asyncio.run(work(engine_of))
    with pytest.raises(EngineDeadError, match="exit code 7.*as it started"):
        asyncio.run(work(slow_engine.broken))


# ---- as a command ----


def test_a_server_that_is_killed_leaves_no_orphan() -> None:
    with process("--engines", "2", "--warm-up", "", "--micro-batch", "8", "--max-budget", "100000") as (server, url):
        answer = post(url, prompt=PROMPT, method="svdd", budget=50, seed=5, n=2)
        for repeat, entry in enumerate(answer["data"]):
            sample = flowfast.search(
                flowfast.load("scenes"), [PROMPT], reward="scenes", method="svdd", budget=50, seed=5, repeat=repeat,
                micro_batch=8,
            ).samples[0]  # fmt: skip
            assert np.array_equal(pixels(entry["b64_json"]), to_pixels(sample.image[None])[0].permute(1, 2, 0).numpy())
        children = children_of(server.pid)
        assert len(children) >= 2

        def long() -> None:
            with contextlib.suppress(OSError):
                post(url, prompt=PROMPT, method="svdd", budget=100_000, n=4)

        asking = threading.Thread(target=long)
        asking.start()
        time.sleep(1)
        server.kill()
        server.wait()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in children))
        asking.join(10)


def post(url: str, **body: Any) -> Any:
    headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
    asked = urllib.request.Request(f"{url}/images/generations", json.dumps(body).encode(), headers)
    return json.load(urllib.request.urlopen(asked, timeout=PATIENCE))


def children_of(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            if int(path.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(path.parent.name))
    return found
