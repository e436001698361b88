"""POST /v1/images/generations: what it answers, and that this is what flowfast.search finds."""

from __future__ import annotations

import base64
import io
import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from starlette.testclient import TestClient

import flowfast
from flowfast.rewards.pixels import to_pixels
from tests.serve.conftest import PATH, SEARCH, Pictures, events_of, pixels, served
from tests.toys import NearTarget


def ask(client: TestClient, **fields: Any) -> dict[str, Any]:
    answer = client.post(PATH, json={"prompt": "a", **SEARCH, **fields})
    assert answer.status_code == 200, answer.text
    return answer.json()


def searched(micro_batch: int, **options: Any) -> Any:
    params = {**SEARCH, **options}
    found = flowfast.search(Pictures(), ["a"], reward=NearTarget(), micro_batch=micro_batch, **params)
    return found.samples[0]


def bytes_of(image: torch.Tensor) -> np.ndarray[Any, Any]:
    return to_pixels(image[None])[0].permute(1, 2, 0).numpy()


def test_the_picture_is_that_of_flowfast_search(shared: TestClient) -> None:
    answer = ask(shared, seed=3, n=3, repeat=5)
    assert {"created", "data", "usage", "size"} <= set(answer) and answer["size"] == "6x4"
    seen = set()
    for index, entry in enumerate(answer["data"]):
        facts = entry["flowfast"]
        sample = searched(facts["micro_batch"], seed=3, repeat=5 + index)
        assert np.array_equal(pixels(entry["b64_json"]), bytes_of(sample.image))
        assert (facts["reward"], facts["nfe"], facts["repeat"]) == (sample.reward, sample.nfe, 5 + index)
        assert facts["winner"]["key"] == str(sample.winner.key)
        assert [tuple(step) for step in facts["winner"]["path"]] == list(sample.winner.path)
        assert facts["method"] == "svdd" and facts["stopped"] == "budget" and facts["rerun"] == {}
        assert 0 <= facts["queue_s"] <= facts["total_s"]
        seen.add(entry["b64_json"])
    assert len(seen) == 3
    assert answer["usage"]["total_tokens"] == sum(entry["flowfast"]["nfe"] for entry in answer["data"])
    assert ask(shared, seed=3, n=3, repeat=5)["data"][1]["b64_json"] == answer["data"][1]["b64_json"]


def test_other_fields_reach_the_search(shared: TestClient) -> None:
    base = ask(shared)["data"][0]
    assert ask(shared, budget=20)["data"][0]["flowfast"]["budget"] == 20
    assert ask(shared, method="bon")["data"][0]["flowfast"]["method"] == "bon"
    assert ask(shared, until=-1e9)["data"][0]["flowfast"]["stopped"] == "until"
    assert ask(shared, seed=10**30)["data"][0]["b64_json"] != base["b64_json"]
    assert ask(shared, reward="far", priority=9, deadline_ms=60_000)["data"][0]["b64_json"] == base["b64_json"]
    top = ask(shared, method="bon", top_k=3)["data"]
    assert [entry["flowfast"]["rank"] for entry in top] == [0, 1, 2]
    rewards = [entry["flowfast"]["reward"] for entry in top]
    assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == 3
    sample = searched(4, method="bon", top_k=3)
    assert rewards == [ranked.reward for ranked in sample.top]


@pytest.mark.parametrize(("quality", "nfe"), [("low", 20), ("medium", 40), ("auto", 40), ("standard", 40)])
def test_qualities_are_budgets(shared: TestClient, quality: str, nfe: int) -> None:
    answer = shared.post(PATH, json={"prompt": "a", "method": "svdd", "quality": quality}).json()
    assert answer["data"][0]["flowfast"]["budget"] == nfe and answer["quality"] == quality


def test_formats(shared: TestClient) -> None:
    exact = pixels(ask(shared)["data"][0]["b64_json"])
    sizes = {}
    for format in ("png", "jpeg", "webp"):
        for compression in (100, 5):
            data = base64.b64decode(
                ask(shared, output_format=format, output_compression=compression)["data"][0]["b64_json"]
            )
            image = Image.open(io.BytesIO(data))
            assert image.format == format.upper() and image.size == (6, 4)
            sizes[format, compression] = len(data)
            if compression == 100:
                assert np.abs(np.asarray(image.convert("RGB")).astype(int) - exact).max() < (
                    1 if format == "png" else 90
                )
    assert sizes["png", 100] == sizes["png", 5]
    assert sizes["jpeg", 100] > sizes["jpeg", 5] and sizes["webp", 100] >= sizes["webp", 5]


def test_what_stock_clients_send(shared: TestClient) -> None:
    """Open WebUI's body, and all that OpenAI's API takes without effect here; null is as good as nothing."""
    web = {"model": "toy", "prompt": "a", "n": 1, "size": "6x4", "response_format": "b64_json"}
    assert shared.post(PATH, json=web).status_code == 200
    words = {
        "background": "transparent",
        "moderation": "low",
        "style": "natural",
        "user": "me",
        "safety_identifier": "x",
    }
    nothing = dict.fromkeys(("model", "n", "size", "quality", "stream", "seed", "until", "top_k", "output_format"))
    assert ask(shared, **nothing)["data"][0]["b64_json"] == ask(shared, **words)["data"][0]["b64_json"]


class Ticking(Pictures):
    """A model call takes ten times as long from call number 5 on."""

    def velocity(self, x_t: torch.Tensor, t: torch.Tensor, cond: dict[str, torch.Tensor]) -> torch.Tensor:
        time.sleep(0.004 if self.calls < 5 else 0.04)
        return super().velocity(x_t, t, cond)


def test_a_deadline_is_met_by_less_budget_and_overshoots_by_a_round_at_most() -> None:
    """Of 200 NFE in calls of four, 2 s; the cuts are in the answer, with which flowfast.search repeats it."""
    with served(flow=Ticking(), quality={"medium": 200}, warm_up="") as (client, _):
        facts = ask(client, budget=200, deadline_ms=1000, method="bon")["data"][0]["flowfast"]
        assert facts["stopped"] == "deadline" and facts["rerun"]["cuts"] and 20 <= facts["nfe"] < 200
        assert facts["total_s"] < 1 + 0.04 * 6 + 0.5  # half a second for a machine with other work
        again = searched(facts["micro_batch"], budget=200, method="bon", **facts["rerun"])
        assert again.reward == facts["reward"] and again.nfe == facts["nfe"]


def test_priority_orders_those_that_wait_and_until_ends_them() -> None:
    with served(slots=1, warm_up="") as (client, server):
        server.flow.free.clear()
        ended: list[int] = []

        def draw(priority: int) -> None:
            ask(client, priority=priority, until=-1e9)
            ended.append(priority)

        threads = []
        for count, priority in enumerate((5, 9, 0, 3)):
            threads.append(threading.Thread(target=draw, args=(priority,)))
            threads[-1].start()
            while server.serving.gate.inside <= count:
                time.sleep(0.002)
            assert server.flow.reached.wait(10)
            time.sleep(0.02)
        server.flow.free.set()
        for thread in threads:
            thread.join(20)
        assert ended == [5, 0, 3, 9]  # the first one had the slot


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_a_stream_has_its_partial_images_and_ends_as_the_answer_does(shared: TestClient, count: int) -> None:
    fields = {"prompt": "a", **SEARCH, "stream": True, "partial_images": count, "seed": 7}
    answer = shared.post(PATH, json=fields)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/event-stream")
    *partial, last = events_of(answer.text)
    assert [event["type"] for event in partial] == ["image_generation.partial_image"] * count
    assert [event["partial_image_index"] for event in partial] == list(range(count))
    spent = [event["flowfast"]["nfe"] for event in partial]
    assert all(nfe >= 40 * (k + 1) // (count + 1) for k, nfe in enumerate(spent)) and spent == sorted(set(spent))
    assert last["type"] == "image_generation.completed"
    whole = ask(shared, seed=7)["data"][0]
    assert last["b64_json"] == whole["b64_json"] and last["flowfast"]["reward"] == whole["flowfast"]["reward"]
    assert last["usage"]["total_tokens"] == last["flowfast"]["nfe"]
    for event in partial:
        assert pixels(event["b64_json"]).shape == (4, 6, 3) and event["size"] == "6x4"


def test_a_stream_of_several(shared: TestClient) -> None:
    answer = shared.post(PATH, json={"prompt": "a", **SEARCH, "stream": True, "n": 3, "partial_images": 1})
    events = events_of(answer.text)
    done = [event for event in events if event["type"].endswith("completed")]
    assert sorted(event["flowfast"]["index"] for event in done) == [0, 1, 2]
    whole = {k: entry["b64_json"] for k, entry in enumerate(ask(shared, n=3)["data"])}
    assert {event["flowfast"]["index"]: event["b64_json"] for event in done} == whole


def test_edits_are_named_as_missing(shared: TestClient) -> None:
    answer = shared.post("/v1/images/edits", content=b"x")
    assert answer.status_code == 501 and "images/edits" in answer.json()["error"]["message"]


def test_who_watches(shared: TestClient) -> None:
    ask(shared, n=2)
    assert shared.get("/health").json() == {"status": "ok"} and shared.head("/health").status_code == 200
    assert shared.get("/ready").json() == {"status": "ready"}
    assert [entry["id"] for entry in shared.get("/v1/models").json()["data"]] == ["toy"]
    assert PATH in shared.get("/openapi.json").json()["paths"]
