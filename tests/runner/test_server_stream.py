"""examples/cpp/server with OpenAI's own client: fields, errors, models, partial images; and streams that are left."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from PIL import Image
from torch import Tensor

import flowfast
from tests.cpp import ROOT
from tests.runner.server import LONG, PROMPT, SHORT, SLOTS, Server, pixels, served

BUDGET = 100


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"http://127.0.0.1:{server.port}/v1", api_key="none", max_retries=0, timeout=60)


@pytest.fixture
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


def events_of(stream: Any) -> list[dict[str, Any]]:
    return [event.model_dump() for event in stream]


def of_search(**options: Any) -> Tensor:
    """The picture of `flowfast.search`, in 8 bits."""
    sample = flowfast.search(flowfast.load("scenes"), [PROMPT], reward="scenes", method="rbf", **options).samples[0]
    return in_8_bits(sample.image)


def in_8_bits(image: Tensor) -> Tensor:
    return (image * 255).round().to(torch.uint8).permute(1, 2, 0)


# ---- whole answers ----


def test_the_client_draws_what_search_finds(client: openai.OpenAI) -> None:
    found = client.images.generate(
        prompt=PROMPT, model="scenes", n=2, size="32x32", quality="low", background="auto", moderation="low",
        style="vivid", output_format="png", output_compression=100, response_format="b64_json", user="me",
        extra_body={"seed": 5, "safety_identifier": "me"},
    )  # fmt: skip
    assert found.data is not None and len(found.data) == 2 and found.usage is not None
    assert (found.size, found.quality, found.output_format, found.background) == ("32x32", "low", "png", "opaque")
    entries: list[dict[str, Any]] = [entry.model_dump() for entry in found.data]
    assert found.usage.output_tokens == sum(entry["flowfast"]["nfe"] for entry in entries)
    assert found.usage.output_tokens_details is not None
    assert found.usage.input_tokens_details.image_tokens == 0
    for repeat, entry in enumerate(entries):
        size = entry["flowfast"]["micro_batch"]
        wanted = of_search(budget=50, seed=5, repeat=repeat, micro_batch=size, slots=SLOTS)
        assert torch.equal(pixels(entry), wanted)


def test_the_client_knows_the_errors(client: openai.OpenAI) -> None:
    refused: dict[str, Any] = {
        "prompt": "a poem about nothing", "size": "64x64", "quality": "ultra", "output_format": "webp", "n": 11,
        "output_compression": 101, "partial_images": 4, "response_format": "url",
    }  # fmt: skip
    for stream in (False, True):
        for field, value in refused.items():
            with pytest.raises(openai.BadRequestError) as error:
                client.images.generate(**({"prompt": PROMPT, "stream": stream} | {field: value}))
            assert (error.value.param, error.value.type) == (field, "invalid_request_error"), field
        with pytest.raises(openai.BadRequestError, match='unknown field "colour"'):
            client.images.generate(prompt=PROMPT, stream=stream, extra_body={"colour": "red"})
        with pytest.raises(openai.NotFoundError) as missing:
            client.images.generate(prompt=PROMPT, stream=stream, model="dall-e-3")
        assert missing.value.param == "model"


def test_models(client: openai.OpenAI, broken: Path) -> None:
    started = time.time()
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("scenes", "model", "flowfast")
    assert started - 600 < model.created <= started
    assert client.models.retrieve("scenes") == model
    for name in ("scene", "scenes/", "%", "scenes%"):
        with pytest.raises(openai.NotFoundError, match='model must be "scenes"') as missing:
            client.models.retrieve(name)
        assert missing.value.param == "model"
    with served(broken) as server:
        assert client_of(server).models.retrieve("ours/scenes 1").id == "ours/scenes 1"
        assert server.ask("GET", "/v1/models/ours/scenes%201")[2]["id"] == "ours/scenes 1"
        assert server.ask("GET", "/v1/models/ours%2fscenes%201")[0] == 200


# ---- streams ----


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_client_streams(server: Server, client: openai.OpenAI, count: int) -> None:
    own = {"budget": BUDGET, "seed": 3}
    events = events_of(client.images.generate(prompt=PROMPT, stream=True, partial_images=count, extra_body=own))
    kinds = [event["type"] for event in events]
    assert kinds == ["image_generation.partial_image"] * count + ["image_generation.completed"]
    whole = server.generate(**own)[2]["data"][0]
    assert events[-1]["b64_json"] == whole["b64_json"]
    times = {"queue_s", "total_s"}
    same = {name: fact for name, fact in whole["flowfast"].items() if name not in times}
    assert {name: fact for name, fact in events[-1]["flowfast"].items() if name not in times} == same
    assert events[-1]["usage"]["total_tokens"] == same["nfe"]
    for event in events:
        assert (event["size"], event["quality"], event["background"]) == ("32x32", "auto", "opaque")
        assert event["output_format"] == "png" and abs(event["created_at"] - time.time()) < 60
    for number, event in enumerate(events[:-1]):
        assert event["partial_image_index"] == number
        part = BUDGET * (number + 1) / (count + 1)
        assert part <= event["flowfast"]["nfe"] <= part + 8  # a round more
        assert (event["flowfast"]["index"], event["flowfast"]["budget"]) == (0, BUDGET)


def looks_of_search(count: int, **options: Any) -> list[tuple[int, float | None, Tensor]]:
    """What is to be shown on the way, by the rounds in Python: NFE, best reward of a finished sample, picture."""
    scorer, images, rounds = flowfast.rewards.load("scenes"), dict[float, Tensor](), list[list[Any]]()

    def note(_: Any, given: tuple[Any, ...], rewards: Tensor) -> None:
        images.update(zip(rewards.tolist(), given[0].clone(), strict=True))

    scorer.register_forward_hook(note)
    flowfast.search(flowfast.load("scenes"), [PROMPT], reward=scorer, on_round=rounds.append, **options)
    shown, seen, before = [], [], 0
    for candidates in rounds:
        seen += [each for each in candidates if each.reward is not None]
        nfe = candidates[0].nfe
        passed = min(count, nfe * (count + 1) // options["budget"])
        if seen and passed > before:
            best, before = max(seen, key=lambda each: (each.transition, each.reward)), passed
            shown.append((nfe, best.reward if best.finished else None, in_8_bits(images[best.reward])))
    return shown


def check_looks(client: openai.OpenAI, method: str, **own: Any) -> list[float | None]:
    """Partial images are those of `looks_of_search`, whose best rewards it returns."""
    *partial, last = events_of(client.images.generate(prompt=PROMPT, stream=True, partial_images=3, extra_body=own))
    micro_batch = last["flowfast"]["micro_batch"]
    wanted = looks_of_search(3, method=method, slots=SLOTS, micro_batch=micro_batch, **own)
    assert [event["flowfast"]["nfe"] for event in partial] == [nfe for nfe, _, _ in wanted]
    for event, (_, reward, image) in zip(partial, wanted, strict=True):
        assert event["flowfast"]["best_reward"] == (None if reward is None else pytest.approx(reward, abs=1e-5))
        assert (pixels(event).int() - image.int()).abs().max() <= 1
        assert not torch.equal(pixels(event), pixels(last)) or reward == pytest.approx(last["flowfast"]["reward"])
    return [reward for _, reward, _ in wanted]


@pytest.mark.parametrize("seed", [0, 1])
def test_partial_images_are_posterior_means(client: openai.OpenAI, seed: int) -> None:
    assert check_looks(client, "rbf", budget=BUDGET, seed=seed) == [None, None, None]


def test_partial_images_are_finished_samples_once_there_are_any(tmp_path: Path) -> None:
    """Best-of-n in slots of one chain, which looks at nothing but finished samples."""
    path = tmp_path / "bon.pt"
    flowfast.export(
        flowfast.load("scenes"), path, reward="scenes", method="bon", budget=200, slots=SLOTS, micro_batch=4
    )
    with served(path) as server:
        rewards = check_looks(client_of(server), "bon", budget=200, seed=0)
    assert rewards and None not in rewards


def test_a_stream_of_several_images(server: Server, client: openai.OpenAI) -> None:
    own = {"budget": BUDGET, "seed": 1}
    events = events_of(client.images.generate(prompt=PROMPT, n=3, stream=True, partial_images=2, extra_body=own))
    whole = server.generate(n=3, **own)[2]["data"]
    for index in range(3):
        own_events = [event for event in events if event["flowfast"]["index"] == index]
        assert [event.get("partial_image_index") for event in own_events] == [0, 1, None]
        assert own_events[-1]["b64_json"] == whole[index]["b64_json"]


def test_a_stream_that_fails(archive: Path, broken: Path) -> None:
    """Within a second the error has a status of its own; later, as here when a slot is free, it is the last event."""
    with served(broken) as server, pytest.raises(openai.InternalServerError, match="NaN"):
        client_of(server).images.generate(prompt=PROMPT, stream=True, extra_body={"budget": SHORT})
    with served(archive) as server:
        clients = [server.send() for _ in range(SLOTS)]
        server.wait_until(running=SLOTS, queued=0)
        stream = client_of(server).images.generate(prompt="a poem about nothing", stream=True)
        for client in clients:
            client.close()
        with pytest.raises(openai.APIError, match="a poem about nothing") as error:
            list(stream)
        assert type(error.value) is openai.APIError
        server.wait_until(running=0, queued=0)
        assert server.answers() == {200: 1}


def test_a_full_queue_and_a_stream(archive: Path) -> None:
    with served(archive, "--queue", "0") as server:
        clients = [server.send(stream=True) for _ in range(SLOTS)]
        server.wait_until(running=SLOTS, queued=0)
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            client_of(server).images.generate(prompt=PROMPT, stream=True)
        for client in clients:
            client.close()
        server.wait_until(running=0, queued=0, seconds=2)


def received(client: socket.socket, word: bytes) -> bytes:
    """What it gets until a word has come."""
    data = b""
    while word not in data:
        part = client.recv(1 << 16)
        assert part, data[-200:]
        data += part
    return data


def test_clients_that_leave_a_stream_free_their_slots(archive: Path) -> None:
    """Between two events by a reset, before the first one, and one that waits; the others go on."""
    with served(archive, "--queue", "8") as server:
        between = server.send(stream=True, partial_images=3, budget=LONG)
        head = received(between, b"partial_image_index")
        assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n")
        between.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        between.close()
        server.wait_until(running=0, queued=0, seconds=2)
        assert server.metrics()["cancelled_total"] == 1

        silent = [server.send(stream=True) for _ in range(SLOTS)]
        waiting = server.send(stream=True, partial_images=2, n=3)
        stays = server.send(stream=True, partial_images=1, budget=2 * BUDGET)
        server.wait_until(running=SLOTS, queued=4)
        assert b"\r\n\r\n: wait\n\n" in received(waiting, b": wait\n\n")
        for client in (*silent, waiting):
            client.close()
        server.wait_until(running=1, queued=0, seconds=2)
        said = b"".join(iter(lambda: stays.recv(1 << 16), b""))
        assert said.count(b"event: image_generation.partial_image\n") == 1
        assert said.count(b"event: image_generation.completed\n") == 1
        stays.close()
        server.wait_until(running=0, queued=0, seconds=2)
        assert server.metrics()["cancelled_total"] == 1 + SLOTS + 1
        assert server.answers() == {200: 1}
        assert server.generate(n=10)[0] == 200  # all places are free again


def test_a_stream_ends_with_its_connection(server: Server) -> None:
    """As HTTP/1.0 has it, for whatever client."""
    body = json.dumps({"prompt": PROMPT, "budget": SHORT, "stream": True})
    head = "POST /v1/images/generations HTTP/1.0\r\nContent-Type: application/json\r\n"
    head, _, events = server.raw(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode()).partition(b"\r\n\r\n")
    for line in (b"Cache-Control: no-store", b"X-Accel-Buffering: no", b"Connection: close"):
        assert line in head.split(b"\r\n")
    name, data, *end = events.decode().split("\n")
    assert (name, end) == ("event: image_generation.completed", ["", ""])
    assert json.loads(data.removeprefix("data: "))["type"] == "image_generation.completed"


def test_drain_waits_for_a_stream(archive: Path) -> None:
    with served(archive) as server:
        client = server.send(stream=True, partial_images=1, budget=2 * BUDGET)
        server.wait_until(running=1, queued=0)
        server.process.send_signal(signal.SIGTERM)
        said = b"".join(iter(lambda: client.recv(1 << 16), b""))
        assert b"event: image_generation.completed\n" in said
        assert server.process.wait(20) == 0
        client.close()


def test_streams_beside_other_requests_change_nothing(server: Server, client: openai.OpenAI) -> None:
    alone = server.generate(seed=7, budget=BUDGET)[2]["data"][0]["b64_json"]
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=3, extra_body={"seed": 9, "budget": LONG}
    )
    beside: Iterator[Any] = iter(stream)
    next(beside)
    assert server.generate(seed=7, budget=BUDGET)[2]["data"][0]["b64_json"] == alone
    assert [event.type for event in beside][-1] == "image_generation.completed"


def test_the_example_of_flowfast_serve(server: Server, tmp_path: Path) -> None:
    argv = [sys.executable, ROOT / "examples/serve_client.py", PROMPT, f"http://127.0.0.1:{server.port}/v1"]
    done = subprocess.run(argv, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("of 200 NFE") == 3
    for name in ("partial-0.png", "partial-2.png", "best.png"):
        assert Image.open(tmp_path / name).size == (32, 32)
