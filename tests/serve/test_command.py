"""`flowfast serve` as a process of its own: its socket, its signals, its refusals; and OpenAI's client."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from PIL import Image

import flowfast
from flowfast.cli import main
from flowfast.errors import OptionError
from flowfast.rewards.pixels import to_pixels
from flowfast.serve.config import ServeConfig, check_open
from flowfast.serve.run import listen

ROOT = Path(__file__).resolve().parents[2]
PROMPT = "two red circles"
KEY = "secret-of-the-test"


@contextmanager
def process(*options: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A server that is ready, and its address."""
    argv = [sys.executable, "-m", "flowfast.cli", "serve", "--port", "0", "--quality", "low=50,medium=100", *options]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FLOWFAST_API_KEY": KEY}
    heeds = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731  (background jobs of a shell do not)
    with subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, preexec_fn=heeds
    ) as server:
        try:
            assert server.stdout is not None
            line = server.stdout.readline()
            assert line.startswith("scenes at http://127.0.0.1:"), line
            url = line.split()[2].rstrip(";")
            assert server.stdout.readline() == "ready\n"
            yield server, url
        finally:
            server.kill()


def get(url: str) -> int:
    try:
        return int(urllib.request.urlopen(url, timeout=10).status)
    except urllib.error.HTTPError as error:
        return error.code


def pixels(text: str) -> Any:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(text))))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with process() as (server, address):
        yield address
        server.send_signal(signal.SIGTERM)
        assert server.wait(30) == 0
        assert server.stderr is not None
        lines = [json.loads(line) for line in server.stderr.read().splitlines()]  # the log, and nothing else
        check_log(lines)


def check_log(lines: list[dict[str, Any]]) -> None:
    """Of all tests of this file: facts of each request, and no text of any."""
    assert all({"request", "method", "route", "status", "seconds"} <= set(line) for line in lines)
    drawn = [line for line in lines if line["route"] == "/v1/images/generations" and line["status"] == 200]
    assert drawn and all(line["nfe"] >= 50 * line["n"] // 2 for line in drawn if "nfe" in line)
    assert sum("nfe" in line for line in drawn) >= len(drawn) - 2  # those whose client left have none
    for text in (PROMPT, "poem", "colour", KEY, "another", "dall-e", "Bearer"):
        assert text not in json.dumps(lines), text


@pytest.fixture
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30)


def test_the_stock_client_draws_what_flowfast_search_finds(client: openai.OpenAI) -> None:
    found = client.images.generate(
        prompt=PROMPT, model="scenes", n=2, size="32x32", quality="low", output_format="png",
        response_format="b64_json", extra_body={"seed": 5, "method": "svdd"},
    )  # fmt: skip
    assert found.data is not None and len(found.data) == 2
    assert found.size == "32x32" and found.quality == "low" and found.usage is not None
    for repeat, entry in enumerate(found.data):
        facts: Any = entry.model_dump()["flowfast"]
        result = flowfast.search(
            flowfast.load("scenes"), [PROMPT], reward="scenes", method="svdd", budget=50, seed=5, repeat=repeat,
            micro_batch=facts["micro_batch"],
        )  # fmt: skip
        expected = to_pixels(result.samples[0].image[None])[0].permute(1, 2, 0).numpy()
        assert np.array_equal(pixels(entry.b64_json or ""), expected)
        assert facts["reward"] == result.samples[0].reward


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_the_stock_client_streams(client: openai.OpenAI, count: int) -> None:
    stream = client.images.generate(
        prompt=PROMPT, stream=True, partial_images=count, extra_body={"method": "svdd", "budget": 100}
    )
    events = list(stream)
    kinds = [event.type for event in events]
    assert kinds == ["image_generation.partial_image"] * count + ["image_generation.completed"]
    assert all(pixels(event.b64_json).shape == (32, 32, 3) for event in events)


def test_the_stock_client_knows_the_errors(client: openai.OpenAI, url: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt="a poem about nothing")
    assert refused.value.param == "prompt"
    with pytest.raises(openai.BadRequestError, match="unknown field 'colour'"):
        client.images.generate(prompt=PROMPT, extra_body={"colour": "red"})
    with pytest.raises(openai.NotFoundError):
        client.images.generate(prompt=PROMPT, model="dall-e-3")
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=url, api_key="another", max_retries=0).models.list()
    with pytest.raises(openai.InternalServerError, match="images/edits"):
        client.images.edit(image=b"x", prompt=PROMPT)
    assert [model.id for model in client.models.list()] == ["scenes"]
    assert client.models.retrieve("scenes").owned_by == "flowfast"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-3")
    with pytest.raises(openai.BadRequestError):
        list(client.images.generate(prompt="a poem about nothing", stream=True))


HEAD = b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer " + KEY.encode()
HEAD += b"\r\nContent-Type: application/json\r\n"


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (HEAD + b"Content-Length: 99999999999\r\n\r\n", 413),
        (HEAD + b"Content-Length: 999999999999999999999999999999\r\n\r\n", 400),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"1\r\na\r\n" * 1_000_000, 411),
        (HEAD + b"Content-Length: 300000\r\n\r\n" + b" " * 300_000, 413),
        (HEAD + b"Content-Length: -5\r\n\r\n", 400),
        (HEAD + b"X: a\r\n" * 100_000 + b"\r\n", 400),
        (b"\x16\x03\x01\x02", 400),
    ],
    ids=["length", "longer", "chunks", "body", "negative", "headers", "tls"],
)
def test_hostile_bytes_are_refused_at_once(url: str, data: bytes, status: int) -> None:
    host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
    with socket.create_connection((host, int(port)), timeout=10) as connection:
        sending = threading.Thread(target=send_all, args=(connection, data))
        sending.start()
        answer = connection.recv(65536)
        assert answer.startswith(f"HTTP/1.1 {status} ".encode()), answer[:80]
    sending.join(10)
    assert get(url.removesuffix("/v1") + "/health") == 200


def send_all(connection: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # refused before its end
        connection.sendall(data)


def test_the_example(url: str, tmp_path: Path) -> None:
    argv = [sys.executable, str(ROOT / "examples/serve_client.py"), PROMPT, url]
    env = {**os.environ, "FLOWFAST_API_KEY": KEY}
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(partial-\d.png after \d+ of 100 NFE\n){3}best.png: reward .+ s\n", done.stdout), done.stdout
    for name in ("partial-0.png", "partial-2.png", "best.png"):
        assert Image.open(tmp_path / name).size == (32, 32)


def test_sigterm_answers_what_runs_and_ready_says_no() -> None:
    with process("--warm-up", "") as (server, url):
        found: list[Any] = []

        def ask() -> None:
            client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, timeout=30)
            found.append(client.images.generate(prompt=PROMPT, n=10, extra_body={"method": "svdd", "budget": 100}))

        asking = threading.Thread(target=ask)
        asking.start()
        root = url.removesuffix("/v1")
        end = time.monotonic() + 20
        while b"num_requests_running 0" in urllib.request.urlopen(f"{root}/metrics", timeout=10).read():
            assert time.monotonic() < end
        assert get(f"{root}/ready") == 200
        server.send_signal(signal.SIGTERM)
        told = time.monotonic()
        assert get(f"{root}/ready") == 503
        assert time.monotonic() - told < 5  # milliseconds on a machine with nothing else to do
        asking.join(30)
        assert len(found) == 1 and len(found[0].data) == 10
        assert server.wait(30) == 0


def test_a_second_signal_ends_at_once() -> None:
    with process("--warm-up", "", "--drain-seconds", "600", "--max-budget", "100000") as (server, url):
        body = json.dumps({"prompt": PROMPT, "method": "svdd", "budget": 100_000}).encode()
        headers = {"content-type": "application/json", "authorization": f"Bearer {KEY}"}
        asked = urllib.request.Request(f"{url}/images/generations", body, headers)

        def ask() -> None:
            with pytest.raises(OSError):
                urllib.request.urlopen(asked, timeout=60)

        asking = threading.Thread(target=ask)
        asking.start()
        time.sleep(1)
        server.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert server.poll() is None
        server.send_signal(signal.SIGTERM)
        assert server.wait(10) == -signal.SIGTERM
        asking.join(10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "192.0.2.1"], "--allow-anonymous"),
        (["--host", "::"], "FLOWFAST_API_KEY"),
        (["--host", "192.0.2.1", "--api-key", "two words"], "printable ASCII"),
        (["--quality", "low"], "low=50"),
        (["--quality", "best=5"], "low, medium, high"),
        (["--quality", "low=5", "--max-budget", "3"], "max_budget"),
        (["--model", "nothing"], "unknown model 'nothing'"),
        (["--reward", "beauty"], "unknown reward 'beauty'"),
        (["--warm-up", "a poem"], "poem"),
        (["--slots", "0"], "slots"),
        (["--size", "64x64"], "model 'scenes' draws pictures of one size"),
        (["--config", "/nowhere/server.yaml"], "cannot read"),
    ],
)
def test_what_it_refuses(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FLOWFAST_API_KEY", raising=False)
    assert main(["serve", "--port", "0", *options]) == 2
    assert words in capsys.readouterr().err


def test_a_server_yaml_and_options_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setattr("flowfast.serve.run.serve", lambda config, key: seen.append((config, key)))
    file = tmp_path / "server.yaml"
    file.write_text("quality: {low: 10, high: 90}\nalias: [one, two]\nport: 9\nqueue: 3\nother_rewards: [sharpness]\n")
    assert main(["serve", "--config", str(file), "--port", "7", "--api-key", "k"]) == 0
    ((config, key),) = seen
    assert (config.port, config.queue, config.models, key) == (7, 3, ("scenes", "one", "two"), "k")
    assert config.quality == {"low": 10, "high": 90} and config.other_rewards == ("sharpness",)
    assert [config.budget_of(name) for name in ("auto", "standard", "hd", "medium")] == [10, 10, 90, None]
    file.write_text("prot: 9\n")
    assert main(["serve", "--config", str(file)]) == 2


def test_answers_do_not_wait_for_the_clients_ack() -> None:
    with listen("127.0.0.1", 0) as place, socket.create_connection(place.getsockname()[:2]):
        accepted, _ = place.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "localhost", "::1"])
def test_loopback_needs_no_key(host: str) -> None:
    check_open(ServeConfig(host=host), None)


@pytest.mark.parametrize("host", ["10.0.0.1", "::", "example.com", "localhost.example.com", ""])
def test_other_addresses_do(host: str) -> None:
    with pytest.raises(OptionError):
        check_open(ServeConfig(host=host), None)
    check_open(ServeConfig(host=host), "key")
    check_open(ServeConfig(host=host, allow_anonymous=True), None)
