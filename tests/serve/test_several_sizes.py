"""`flowfast serve --size`: an engine for each size on one model, in turns."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from starlette.testclient import TestClient

import flowfast
from flowfast.engine.sizes import Turns, engines_of_sizes
from flowfast.errors import ModelError, OptionError
from flowfast.rewards.pixels import to_pixels
from flowfast.serve.app import create_app
from flowfast.serve.config import ServeConfig
from flowfast.serve.engines import warm_up
from flowfast.serve.serving import Serving
from flowfast.serve.sizes import Sizes
from tests.serve.conftest import PATH, SEARCH, pixels
from tests.toys import GaussianFlow, NearTarget

SIZES = ("6x4", "4x8")


class Wide(GaussianFlow):
    """Counts its calls; at no time does one run beside that of another size."""

    at_work = 0
    most_at_work = 0

    def __init__(self, size: str):
        wide, high = map(int, size.split("x"))
        super().__init__((3, high, wide))
        self.calls = 0

    def velocity(self, x_t: Any, t: Any, cond: Any) -> Any:
        self.calls += 1
        Wide.at_work += 1
        Wide.most_at_work = max(Wide.most_at_work, Wide.at_work)
        time.sleep(0.001)
        Wide.at_work -= 1
        return super().velocity(x_t, t, cond)

    def decode(self, x0: Any) -> Any:
        return x0.sigmoid()


class Server:
    def __init__(self) -> None:
        self.flows = {size: Wide(size) for size in SIZES}
        self.reward = NearTarget()
        self.config = ServeConfig(
            model="toy", slots=4, micro_batch=4, quality={"low": 20, "medium": 40}, size=SIZES, warm_up="a"
        )
        self.serving = Serving(self.config, self.make)

    def make(self) -> Sizes:
        self.sizes = Sizes(engines_of_sizes(self.flows, {"near": self.reward}, SIZES, **self.config.engine_options))
        return self.sizes


@pytest.fixture(scope="module")
def server() -> Server:
    return Server()


@pytest.fixture(scope="module")
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(create_app(server.serving), raise_server_exceptions=False) as client:
        while server.serving.phase == "loading":
            time.sleep(0.002)
        assert server.serving.failure is None
        yield client


def expected(size: str, **options: Any) -> np.ndarray[Any, Any]:
    found = flowfast.search(Wide(size), ["a"], reward=NearTarget(), micro_batch=4, **{**SEARCH, **options})
    return to_pixels(found.samples[0].image[None])[0].permute(1, 2, 0).numpy()


def test_each_size_and_quality_is_warm(client: TestClient, server: Server) -> None:
    assert server.serving.sizes == SIZES and server.serving.size == "6x4"
    assert all(flow.calls > 0 for flow in server.flows.values())
    assert server.sizes.standing.rows == sum(engine.standing.rows for engine in server.sizes.engines.values())


@pytest.mark.parametrize(("asked", "size"), [("auto", "6x4"), (None, "6x4"), ("6x4", "6x4"), ("4x8", "4x8")])
def test_a_request_gets_its_size(client: TestClient, asked: str | None, size: str) -> None:
    answer = client.post(PATH, json={"prompt": "a", **SEARCH, "seed": 3, "size": asked}).json()
    assert answer["size"] == size
    assert np.array_equal(pixels(answer["data"][0]["b64_json"]), expected(size, seed=3))


def test_an_unknown_one_is_told_which_there_are(client: TestClient) -> None:
    answer = client.post(PATH, json={"prompt": "a", **SEARCH, "size": "8x4"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
    assert "auto or 6x4 or 4x8" in answer.json()["error"]["message"]


def test_sizes_take_turns(client: TestClient) -> None:
    """Searches of both at once: no call of the model runs beside another, and each has the bits that it has alone."""
    ids = [
        client.post("/v1/searches", json={"prompt": "a", **SEARCH, "n": 3, "seed": 4, "size": size}).json()["id"]
        for size in SIZES
    ]
    end = time.monotonic() + 60
    found = [client.get(f"/v1/searches/{id}").json() for id in ids]
    while any(each["status"] in ("queued", "running") for each in found) and time.monotonic() < end:
        time.sleep(0.01)
        found = [client.get(f"/v1/searches/{id}").json() for id in ids]
    for size, each in zip(SIZES, found, strict=True):
        assert each["status"] == "finished", each
        for repeat, entry in enumerate(each["result"]["data"]):
            assert np.array_equal(pixels(entry["b64_json"]), expected(size, seed=4, repeat=repeat))
    assert Wide.most_at_work == 1


def test_they_share_rewards_and_memory(client: TestClient, server: Server) -> None:
    inner = [engine._engine for engine in server.sizes.engines.values()]
    assert inner[0].loaded.scorers["near"] is inner[1].loaded.scorers["near"] is server.reward
    assert [engine.options.memory_share for engine in inner] == [0.25, 0.25]
    assert [engine.core.make.share for engine in inner] == [0.25, 0.25]  # type: ignore[attr-defined]
    assert server.sizes.rewards == ("near",)


def test_a_death_of_one_is_that_of_all_and_it_drains() -> None:
    async def work() -> None:
        server = Server()
        sizes = server.make()
        assert sizes.death is None
        await sizes.drain(1)
        with pytest.raises(OptionError, match="expected size 6x4 or 4x8, got '8x8'"):
            await anext(sizes.generate("a", size="8x8", budget=20))
        sizes.engines["4x8"].close()
        assert sizes.death is not None
        sizes.close()

    asyncio.run(work())


def test_a_model_that_draws_another_size_is_refused() -> None:
    async def work() -> None:
        server = Server()
        server.flows["4x8"] = Wide("6x4")
        sizes = server.make()
        with pytest.raises(ModelError, match="expected pictures of 4x8 from this model, got 6x4"):
            await warm_up(sizes, server.config)
        sizes.close()

    asyncio.run(work())


def test_no_two_requests_have_one_id() -> None:
    async def work() -> None:
        sizes = Server().make()
        ids = [(await anext(sizes.generate("a", size=size, method="svdd", budget=20))).id for size in SIZES]
        assert ids[0] != ids[1]
        sizes.close()

    asyncio.run(work())


def test_turns_are_fair() -> None:
    turns, order = Turns(), list[int]()

    def work(number: int) -> None:
        for _ in range(5):
            with turns:
                order.append(number)
                time.sleep(0.01)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert len(order) == 15
    assert all(set(order[i : i + 3]) == {0, 1, 2} for i in range(3, 11))  # once all have begun


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"size": "512"}, "such as 512x512"),
        ({"size": "0x8"}, "such as 512x512"),
        ({"size": "8x8,8x8"}, "different sizes"),
        ({"size": ",".join(f"{side}x8" for side in range(8, 25))}, "17 of them"),
        ({"size": "8x8", "model_options": {"height": 8}}, "give one of them"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeConfig(**options)
