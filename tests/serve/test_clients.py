"""Requests as clients send them: OpenAI's own, plain and asyncio, and the bodies of those that people put before it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from starlette.testclient import TestClient

from tests.serve.conftest import PATH, PATIENCE, SEARCH, listening, pixels, served, wait_for

ALIASES = ("dall-e-2", "gpt-image-1")


@pytest.fixture(scope="module")
def aliased() -> Iterator[TestClient]:
    with served(alias=ALIASES) as (client, _):
        yield client


BODIES: dict[str, dict[str, Any]] = {
    "Open WebUI, size left empty": {"model": "toy", "prompt": "a", "n": 1, "response_format": "b64_json"},
    "Open WebUI, with the size of the model": {
        "model": "toy", "prompt": "a", "n": 2, "size": "6x4", "response_format": "b64_json"
    },
    "Open WebUI, without a model": {"model": "dall-e-2", "prompt": "a", "n": 1, "response_format": "b64_json"},
    "Open WebUI, gpt-image with auto, and parameters of its own": {
        "model": "gpt-image-1", "prompt": "a", "n": 1, "size": "auto", "quality": "low", "seed": 3
    },
    "LibreChat": {
        "model": "gpt-image-1", "prompt": "a", "n": 1, "background": "auto", "output_format": "png", "quality": "auto",
        "size": "auto",
    },
    "LibreChat, webp": {
        "model": "gpt-image-1", "prompt": "a", "n": 1, "background": "transparent", "output_format": "webp",
        "output_compression": 100, "quality": "auto", "size": "auto",
    },
    "LiteLLM": {
        "model": "toy", "prompt": "a", "n": 1, "quality": "standard", "size": "6x4", "style": "vivid", "user": "u-1",
        "response_format": "b64_json", "guidance": 3.5, "seed": 1,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", BODIES)
def test_the_bodies_of_other_programs(aliased: TestClient, name: str) -> None:
    """Open WebUI: backend/open_webui/routers/images.py; LibreChat: OpenAIImageTools.js; LiteLLM: what it passes on to
    servers like OpenAI's. Their queries and headers mean nothing here."""
    headers = {"X-OpenWebUI-User-Name": "jane", "Authorization": "Bearer none", "api-key": "none"}
    answer = aliased.post(f"{PATH}?api-version=2025-04-01", json=BODIES[name], headers=headers)
    assert answer.status_code == 200, answer.text
    content = answer.json()
    assert len(content["data"]) == BODIES[name]["n"] and "url" not in content["data"][0]
    assert all(pixels(entry["b64_json"]).shape == (4, 6, 3) for entry in content["data"])


def test_a_size_that_is_not_there_is_told_with_those_that_are(aliased: TestClient) -> None:
    """Open WebUI sends 512x512 until its administrator says otherwise: a picture of another size would be a surprise
    that nobody could explain."""
    body = {"model": "toy", "prompt": "a", "n": 1, "size": "512x512", "response_format": "b64_json"}
    answer = aliased.post(PATH, json=body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "size"
    for word in ("6x4", "auto", "512x512"):
        assert word in answer.json()["error"]["message"]


def test_a_model_that_is_not_there_is_told_how_to_have_it(aliased: TestClient) -> None:
    answer = aliased.post(PATH, json={"model": "dall-e-3", "prompt": "a"})
    assert answer.status_code == 404
    for word in ("toy, dall-e-2, gpt-image-1", "--alias", "dall-e-3"):
        assert word in answer.json()["error"]["message"]


def test_openais_client_times_out_goes_away_and_is_told_to_wait() -> None:
    with listening(queue=0, warm_up="") as (url, server):
        client = openai.OpenAI(base_url=url, api_key="the-key", max_retries=0, timeout=PATIENCE)
        server.flow.free.clear()
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).images.generate(prompt="a", extra_body=SEARCH)
        wait_for(lambda: server.serving.gate.inside == 0)  # it left, and its slot is free
        held = client.images.generate(prompt="a", n=2, stream=True, extra_body=SEARCH)
        with pytest.raises(openai.InternalServerError) as full:
            client.images.generate(prompt="a", extra_body=SEARCH)
        assert full.value.status_code == 503 and full.value.code == "queue_full"
        assert int(full.value.response.headers["retry-after"]) >= 1
        again = client.with_options(max_retries=2)  # by itself, after the time that it is told
        threading.Timer(0.3, server.flow.free.set).start()
        assert again.images.generate(prompt="a", extra_body=SEARCH).data
        assert [event.type for event in held] == ["image_generation.completed"] * 2


@pytest.mark.parametrize("stream", [False, True])
def test_openais_asyncio_client_draws_and_is_cancelled(stream: bool) -> None:
    with listening(warm_up="") as (url, server):

        async def work() -> None:
            async with openai.AsyncOpenAI(base_url=url, api_key="the-key", max_retries=0, timeout=PATIENCE) as client:

                async def draw() -> int:
                    found = await client.images.generate(prompt="a", n=2, stream=stream, extra_body=SEARCH)  # type: ignore
                    return len([event async for event in found]) if stream else len(found.data)

                assert await draw() == 2
                server.flow.reached.clear()
                server.flow.free.clear()
                task = asyncio.create_task(draw())
                await asyncio.to_thread(server.flow.reached.wait, PATIENCE)
                await asyncio.sleep(1.2 if stream else 0)  # its stream has begun
                assert server.serving.gate.inside == 2
                task.cancel()
                await asyncio.wait([task])
                await asyncio.to_thread(wait_for, lambda: server.serving.gate.inside == 0)
                assert server.serving.streams.open == 0
                server.flow.free.set()
                assert await draw() == 2

        asyncio.run(work())
