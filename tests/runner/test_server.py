"""examples/cpp/server, the program: routes, refusals, the full queue, clients that hang up, the end, many clients."""

from __future__ import annotations

import http.client
import json
import resource
import signal
import socket
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import flowfast
from tests.runner.server import ENDLESS, GENERATE, JSON, LONG, PROMPT, SHORT, SLOTS, Server, pixels, served, start

FIELDS = (
    "prompt, n, seed, budget, guidance, negative_prompt, priority, deadline, model, size, quality, response_format, "
    "output_format, output_compression, stream, partial_images, style, background, moderation, user, safety_identifier"
)


# ---- what it answers ----


def test_images_are_those_of_python(server: Server) -> None:
    before = time.time()
    status, _, answer = server.generate(n=2, seed=3, budget=60, model="scenes", response_format="b64_json", user=None)
    assert status == 200
    assert int(before) <= answer["created"] <= time.time()
    assert len(answer["data"]) == 2
    flow = flowfast.load("scenes")
    for repeat, image in enumerate(answer["data"]):
        options = {"method": "rbf", "budget": 60, "seed": 3, "repeat": repeat, "slots": SLOTS}
        sample = flowfast.search(flow, [PROMPT], reward="scenes", **options).samples[0]
        assert torch.equal(pixels(image), (sample.image * 255).round().to(torch.uint8).permute(1, 2, 0))
        facts = image["flowfast"]
        assert facts["reward"] == pytest.approx(sample.reward, abs=1e-6)
        assert (facts["nfe"], facts["seed"], facts["repeat"], facts["index"]) == (sample.nfe, 3, repeat, repeat)
        assert (facts["budget"], facts["reward_calls"]) == (60, sample.reward_calls)
        assert (facts["method"], facts["stopped"]) == ("rbf", "budget")
        assert 0 <= facts["queue_s"] < facts["total_s"] < 60
    assert answer["usage"]["output_tokens"] == sum(image["flowfast"]["nfe"] for image in answer["data"])
    assert (answer["size"], answer["quality"], answer["output_format"]) == ("32x32", "auto", "png")
    assert not torch.equal(pixels(answer["data"][0]), pixels(answer["data"][1]))


def test_fields_reach_the_search(server: Server) -> None:
    image = pixels(server.generate()[2]["data"][0])
    for change in (
        {"seed": 2**63 - 1},
        {"seed": -1},
        {"budget": 100},
        {"guidance": 1.5},
        {"negative_prompt": "two red circles"},
    ):
        status, _, answer = server.generate(**change)
        assert status == 200, answer
        assert not torch.equal(pixels(answer["data"][0]), image), change
    assert torch.equal(pixels(server.generate(seed=None, n=None, guidance=None)[2]["data"][0]), image)


def test_guidance_up_to_1_is_off(server: Server) -> None:
    off = [server.generate(guidance=guidance)[2]["data"][0] for guidance in (1, 0, 0.5)]
    assert len({(image["b64_json"], image["flowfast"]["nfe"]) for image in off}) == 1
    assert server.generate(guidance=0, prompt="four blue squares")[2]["data"][0]["b64_json"] != off[0]["b64_json"]


@pytest.mark.parametrize(
    ("sent", "seed"),
    [
        (3.0, 3), ("3", 3), (" +03 ", 3), (2**53, 2**53), (2**53 + 1, str(2**53 + 1)), (2**64 - 1, str(2**64 - 1)),
        (str(-(2**63)), str(-(2**63))), ("17982163893102248868123", "17982163893102248868123"),
    ],
)  # fmt: skip
def test_seeds_are_any_whole_number(server: Server, sent: Any, seed: int | str) -> None:
    """As a text where other readers of JSON would lose digits; the images are those of Python's seed."""
    facts = server.generate(seed=sent)[2]["data"][0]["flowfast"]
    assert facts["seed"] == seed
    options = {"method": "rbf", "budget": SHORT, "seed": int(sent), "slots": SLOTS}
    sample = flowfast.search(flowfast.load("scenes"), [PROMPT], reward="scenes", **options).samples[0]
    assert facts["reward"] == pytest.approx(sample.reward, abs=1e-3)  # in micro-batches of another size


@pytest.mark.parametrize(
    "sent",
    [
        {"model": "scenes", "n": 1, "size": "32x32", "response_format": "b64_json"},  # Open WebUI
        {"size": "auto", "quality": "hd", "style": "vivid", "user": "me", "n": 1.0},
        {"background": "transparent", "moderation": "low", "safety_identifier": "me", "quality": "low"},
        {"output_format": "png", "output_compression": 100, "stream": False, "partial_images": 3},
        {"size": None, "quality": None, "output_compression": 0, "stream": None, "partial_images": None},
    ],
)
def test_what_clients_of_openai_send(server: Server, sent: dict[str, Any]) -> None:
    """Beside a budget, nothing of it changes the image."""
    wanted = server.generate()[2]["data"]
    status, _, answer = server.generate(**sent)
    assert status == 200, answer
    assert answer["data"][0]["b64_json"] == wanted[0]["b64_json"]


def test_qualities(scenes: Path, archive: Path) -> None:
    """Its archive runs 24 to 200 NFE: what is beyond is the nearest of them."""

    def budgets(*options: str, names: list[str | None]) -> list[int]:
        with served(scenes, *options) as server:
            answers = [server.generate(budget=None, quality=name)[2] for name in names]
            assert [answer["quality"] for answer in answers] == [name or "auto" for name in names]
            return [answer["data"][0]["flowfast"]["budget"] for answer in answers]

    assert budgets(names=["low", "hd"]) == [50, 200]
    names = ["low", "medium", "high", "standard", "hd", "auto", None]
    assert budgets("--quality", "low=1,medium=30,high=40", names=names) == [24, 30, 40, 30, 40, 30, 30]
    assert budgets("--quality", "medium=30", "--budget", "26", names=["auto", "standard"]) == [26, 30]
    with served(archive, "--quality", "high=30,low=24") as server:
        assert server.generate(budget=None)[2]["data"][0]["flowfast"]["budget"] == 30  # the first one
        status, _, answer = server.generate(quality="medium")
        assert (status, answer["error"]["param"]) == (400, "quality")
        assert 'quality must be "auto" or "hd" or "high" or "low" or "standard"' in answer["error"]["message"]


def test_health_and_metrics(archive: Path) -> None:
    with served(archive) as server:
        assert server.ask("GET", "/health?verbose=1")[::2] == (200, {"status": "ok"})
        nfe = sum(server.generate(seed=seed)[2]["usage"]["total_tokens"] for seed in range(3))
        assert server.generate(n=0)[0] == 400
        metrics = server.metrics()
        assert metrics["nfe_total"] == nfe > 0
        assert server.answers() == {200: 3, 400: 1}
        assert metrics['requests_total{route="/health",status="200"}'] == 1
        assert (metrics["queue_length"], metrics["slots_running"], metrics["cancelled_total"]) == (0, 0, 0)
        buckets = [value for name, value in metrics.items() if name.startswith("request_seconds_bucket")]
        assert buckets == sorted(buckets)
        assert buckets[-1] == metrics["request_seconds_count"] == 3
        assert 0 < metrics["request_seconds_sum"] < 60

        lines = server.ask("GET", "/metrics")[2].splitlines()
        described = [line.split()[2] for line in lines if line.startswith("# TYPE")]
        assert described == [line.split()[2] for line in lines if line.startswith("# HELP")]
        for line in lines:
            if not line.startswith("#"):
                name = line.split("{")[0].split()[0]
                assert any(name in (kind, f"{kind}_bucket", f"{kind}_sum", f"{kind}_count") for kind in described), line


# ---- what it refuses ----

REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "not JSON": ("{", None, "the body must be JSON: incomplete JSON"),
    "no body": ("", None, "the body must be JSON"),
    "not UTF-8": (b'{"prompt": "\xff"}', None, "the body must be JSON"),
    "too deep": ("[" * 5000, None, "the body must be JSON: too deep"),
    "no object": ("[1]", None, f"the body must be a JSON object with any of {FIELDS}"),
    "unknown field": ({"promt": "a"}, "promt", f'unknown field "promt": choose of {FIELDS}'),
    "no prompt": ({"prompt": None}, "prompt", "prompt is missing"),
    "prompt that is no text": ({"prompt": [PROMPT]}, "prompt", "prompt must be a string, got ["),
    "prompt the model cannot read": ({"prompt": "a cat"}, "prompt", "prompt 'a cat': unknown colour 'a'"),
    "no image": ({"n": 0}, "n", "n must be a whole number from 1 to 10, got 0"),
    "too many images": ({"n": 11}, "n", "n must be a whole number from 1 to 10, got 11"),
    "a blank prompt": ({"prompt": " \n"}, "prompt", "prompt is empty: write what the picture shows"),
    "half a prompt": ('{"prompt": "\\ud800"}', None, "the body must be JSON"),
    "half a seed": ({"seed": 0.5}, "seed", "seed must be a whole number, or its digits as a text where"),
    "a seed that lost its digits": ({"seed": 2**64}, "seed", "seed must be a whole number, or its digits as a text"),
    "a seed in words": ({"seed": "many"}, "seed", 'a seed must be a whole number of up to 4300 digits, got "many"'),
    "a budget beyond all": ({"budget": 1e30}, "budget", "budget must be a whole number from 1 to"),
    "a budget in words": ({"budget": "100"}, "budget", 'got "100"'),
    "a budget that is no number": ('{"prompt": "a", "budget": NaN}', None, "the body must be JSON"),
    "a negative guidance": ({"guidance": -1}, "guidance", "guidance must be a number from 0 to 1000"),
    "a guidance beyond all": ('{"prompt": "a", "guidance": 1e999}', "guidance", "guidance must be a number from"),
    "no time": ({"deadline": 0}, "deadline", "deadline must be above 0 and at most 1000000 seconds, got 0"),
    "a priority beyond all": ({"priority": 1001}, "priority", "priority must be a whole number from -1000 to 1000"),
    "a field of other servers": ({"until": "0.5"}, "until", 'unknown field "until"'),
    "another size": ({"size": "1024x1024"}, "size", 'size must be "auto" or "32x32", got "1024x1024"'),
    "another format": ({"output_format": "webp"}, "output_format", 'output_format must be "png", got "webp"'),
    "another format yet": ({"output_format": "jpeg"}, "output_format", 'output_format must be "png", got "jpeg"'),
    "too much compression": (
        {"output_compression": 101},
        "output_compression",
        "a whole number from 0 to 100, got 101",
    ),
    "a stream in words": ({"stream": "yes"}, "stream", 'stream must be true or false, got "yes"'),
    "too many partial images": ({"partial_images": 4}, "partial_images", "a whole number from 0 to 3, got 4"),
    "fewer than none": ({"stream": True, "partial_images": -1}, "partial_images", "from 0 to 3, got -1"),
    "a quality that is no text": ({"quality": 3}, "quality", "quality must be a string, got 3"),
    "a quality of its own": ({"quality": "ultra"}, "quality", '"medium" or "standard", got "ultra"'),
    "a background that is no text": ({"background": 3}, "background", "background must be a string, got 3"),
    "a style that is no text": ({"style": []}, "style", "style must be a string, got []"),
    "a moderation that is no text": ({"moderation": {}}, "moderation", "moderation must be a string, got {}"),
    "a user that is no text": ({"user": 1}, "user", "user must be a string, got 1"),
    "an identifier that is no text": ({"safety_identifier": True}, "safety_identifier", "must be a string, got true"),
    "a format that is no text": ({"output_format": 1}, "output_format", "output_format must be a string, got 1"),
    "a size that is no text": ({"size": 32}, "size", "size must be a string, got 32"),
    "true": ({"n": True}, "n", "got true"),
    "budget too small": ({"budget": 23}, "budget", "budgets of 24 to 4000 NFE, got 23"),
    "budget too large": ({"budget": 4001}, "budget", "budgets of 24 to 4000 NFE, got 4001"),
    "guidance in words": ({"guidance": "much"}, "guidance", 'guidance must be a number, got "much"'),
    "a long value": ({"n": 99 * "\u00e9"}, "n", 'got "' + 29 * "\u00e9" + "..."),
    "a URL": ({"response_format": "url"}, "response_format", 'response_format must be "b64_json", got "url"'),
}


@pytest.mark.parametrize("case", REFUSED)
def test_bad_request(server: Server, case: str) -> None:
    sent, field, message = REFUSED[case]
    body = json.dumps({"prompt": PROMPT, "budget": SHORT} | sent) if isinstance(sent, dict) else sent
    status, _, answer = server.ask("POST", GENERATE, body, JSON)
    assert status == 400
    error = answer["error"]
    assert message in error["message"]
    assert (error["type"], error["param"], error["code"]) == ("invalid_request_error", field, None)


def test_another_model(server: Server) -> None:
    status, _, answer = server.generate(model="dall-e-3")
    assert status == 404
    assert answer["error"]["message"] == 'model must be "scenes", got "dall-e-3"'
    assert answer["error"]["param"] == "model"


def test_a_model_that_fails(broken: Path) -> None:
    """An error, and the next request is answered, too."""
    with served(broken) as server:
        for _ in range(2):
            status, _, answer = server.generate(budget=SHORT, n=3)
            assert (status, answer["error"]["type"], answer["error"]["param"]) == (500, "server_error", None)
            assert "NaN" in answer["error"]["message"]
        assert server.ask("GET", "/health")[0] == 200


def test_wrong_paths_methods_and_types(server: Server) -> None:
    status, _, answer = server.ask("GET", "/v1/images")
    assert status == 404
    assert "choose of /health, /metrics, /v1/models, /v1/images/generations" in answer["error"]["message"]
    for method, path, allowed in (
        ("GET", GENERATE, "POST"),
        ("HEAD", GENERATE, "POST"),
        ("POST", "/health", "GET, HEAD"),
        ("DELETE", "/v1/models/scenes", "GET, HEAD"),
    ):
        status, headers, answer = server.ask(method, path)
        assert (status, headers["Allow"]) == (405, allowed)
        assert (answer == "") == (method == "HEAD")
    # What a page of another origin may send without asking is not JSON by its type.
    for kind in ({}, {"Content-Type": "text/plain"}, {"Content-Type": "application/jsonx"}):
        assert server.ask("POST", GENERATE, json.dumps({"prompt": PROMPT}), kind)[0] == 415
    body = json.dumps({"prompt": PROMPT, "budget": SHORT})
    assert server.ask("POST", GENERATE, body, {"Content-Type": "Application/JSON; charset=utf-8"})[0] == 200


@pytest.mark.parametrize("path", ["/health", "/metrics", "/v1/models", "/v1/models/scenes", "/v1/models/none", "/none"])
def test_head(server: Server, path: str) -> None:
    """What GET says, but for the body; the connection goes on."""
    ask = f"HEAD {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode()
    last = b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    head, then, rest = server.raw(ask + last).partition(b"\r\n\r\nHTTP/1.1 200 OK\r\n")
    assert then and rest.endswith(b'{"status":"ok"}')
    status, headers, _ = server.ask("GET", path)
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    if path != "/metrics":  # which count what was asked
        assert f"Content-Length: {headers['Content-Length']}".encode() in head
    assert f"Content-Type: {headers['Content-Type']}".encode() in head


def test_what_is_not_http(server: Server) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode()
    assert server.raw(b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert server.raw(head + b"Content-Length: -1\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert server.raw(head + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert server.raw(head + b"X: " + 9000 * b"x" + b"\r\n\r\n").startswith(b"HTTP/1.1 431 ")
    assert server.raw(head + b"Content-Length: 65537\r\n\r\n" + 65537 * b" ").startswith(b"HTTP/1.1 413 ")
    chunks = b"10000\r\n" + 65536 * b" " + b"\r\n"
    assert server.raw(head + b"Transfer-Encoding: chunked\r\n\r\n" + 2 * chunks).startswith(b"HTTP/1.1 413 ")
    assert server.generate()[0] == 200


def test_slow_clients_time_out(server: Server) -> None:
    start = time.monotonic()
    assert server.raw(b"POST / HTTP/1.1\r\nHost:").startswith(b"HTTP/1.1 408 ")
    assert server.raw(b"POST / HTTP/1.1\r\nContent-Length: 5\r\n\r\nab").startswith(b"HTTP/1.1 408 ")
    assert server.raw(b"") == b""  # it asked nothing
    assert 5.5 < time.monotonic() - start < 20


def test_a_connection_is_kept(server: Server) -> None:
    """Requests that come while a search runs are answered after it, in turn."""
    ask = b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n"
    last = ask.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")
    with server.send(budget=LONG) as client:
        server.wait_until(running=1, queued=0)
        client.sendall(ask + last[:10])
        client.sendall(last[10:])
        said = b"".join(iter(lambda: client.recv(4096), b""))
    assert [part.split(b" ", 1)[0] for part in said.split(b"HTTP/1.1 ")] == [b"", b"200", b"200", b"200"]
    assert said.index(b'"created"') < said.index(b'{"status":"ok"}')
    assert said.count(b'{"status":"ok"}') == 2
    assert server.raw(b"GET /health HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.0 200 OK\r\n")


def test_leave_to_send_a_body(server: Server) -> None:
    head = f"POST {GENERATE} HTTP/1.1\r\nContent-Type: application/json\r\nConnection: close\r\n".encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as client:
        client.sendall(head + b"Expect: 100-continue\r\nContent-Length: 2\r\n\r\n")
        assert client.recv(4096) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"{}")
        assert b"prompt is missing" in b"".join(iter(lambda: client.recv(4096), b""))


def test_options_that_cannot_work(archive: Path, tmp_path: Path) -> None:
    (tmp_path / "damaged.pt").write_bytes(archive.read_bytes()[:-1])
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for program, message in {
            (archive, "--port", port): f"cannot listen at 127.0.0.1 port {port}: Address already in use",
            (archive, "--host", "localhost"): "cannot listen at localhost port 0: Invalid argument",
            (archive, "--queue", "-1"): "--queue must be a whole number from 0 to 1000, got '-1'",
            (archive, "--budget", "23"): "--budget must be from 24 to 4000, as the archive says, got 23",
            (
                archive,
                "--quality",
                "low",
            ): "--quality must name budgets of low, medium, high: low=50,medium=200, got",
            (archive, "--quality", "best=50"): "got 'best=50'",
            (archive, "--quality", "low=50,high=0"): "--quality must be a whole number from 1 to 2147483647, got '0'",
            (archive, "--quality", ""): "--quality must name a budget, low=50, got none",
            (archive, "--prot", "1"): "unknown option --prot",
            (archive, "--device"): "--device needs a value",
            (archive, "--device", "abacus"): "abacus",
            (tmp_path / "none.pt",): "none.pt",
            (tmp_path / "damaged.pt",): "damaged",
        }.items():
            with start(Path(program[0]), *map(str, program[1:])) as process:
                _, error = process.communicate(timeout=60)
                assert process.returncode == 2, error
                assert message in error


def test_no_descriptor_left(archive: Path) -> None:
    """New clients wait until others leave."""
    with served(archive) as server:
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (30, 30))
        clients = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(40)]
        time.sleep(0.3)
        for client in clients:
            client.close()
        assert server.ask("GET", "/health")[0] == 200


# ---- the queue, clients that hang up, the end ----


def status_of(client: socket.socket) -> int:
    with client:
        reply = http.client.HTTPResponse(client)
        reply.begin()
        reply.read()
        return reply.status


def test_full_queue(archive: Path) -> None:
    with served(archive, "--queue", "1") as server:
        assert "n must be a whole number from 1 to 3" in server.generate(n=4)[2]["error"]["message"]
        clients = [server.send() for _ in range(SLOTS)]
        server.wait_until(running=SLOTS, queued=0)
        assert server.generate(n=2)[0] == 429  # one place is left
        clients.append(server.send())
        server.wait_until(running=SLOTS, queued=1)
        status, headers, answer = server.generate()
        assert (status, headers["Retry-After"], answer["error"]["type"]) == (429, "1", "server_error")
        assert "the queue is full" in answer["error"]["message"]
        for client in clients:
            client.close()
        server.wait_until(running=0, queued=0)
        assert server.generate(n=SLOTS + 1)[0] == 200
        assert server.answers() == {200: 1, 400: 1, 429: 2}


def test_a_deadline(archive: Path) -> None:
    with served(archive) as server:
        clients = [server.send() for _ in range(SLOTS)]
        server.wait_until(running=SLOTS, queued=0)
        status, _, answer = server.generate(deadline=1e-6, priority=-1)
        assert (status, answer["error"]["param"]) == (504, "deadline")
        for client in clients:
            client.close()
        server.wait_until(running=0, queued=0)
        seconds = server.generate(budget=100)[2]["data"][0]["flowfast"]["total_s"]  # ENDLESS takes 40 times as long
        image = server.generate(budget=ENDLESS, deadline=5 * seconds)[2]["data"][0]
        assert 0 < image["flowfast"]["nfe"] < ENDLESS
        assert image["flowfast"]["stopped"] == "deadline"


def test_a_client_that_hangs_up_frees_its_slot(archive: Path) -> None:
    with served(archive, "--queue", "8") as server:
        clients = [server.send(seed=seed, budget=ENDLESS if seed else LONG) for seed in range(SLOTS + 6)]
        server.wait_until(running=SLOTS, queued=6)
        for client in clients[1:]:
            client.close()  # one of those that run, and all that wait
        server.wait_until(running=1, queued=0, seconds=2)
        assert status_of(clients[0]) == 200  # the other one goes on
        assert server.metrics()["cancelled_total"] == SLOTS + 5
        assert server.answers() == {200: 1}
        assert server.generate(n=SLOTS + 8)[0] == 200  # all places are free again


def test_reset_and_kill(archive: Path) -> None:
    """A reset, and a client that had sent its next request, are noticed as well."""
    with served(archive) as server:
        reset = server.send()
        reset.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        pipelined = server.send(n=2)
        pipelined.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        flood = server.send()
        server.wait_until(running=SLOTS, queued=2)
        reset.close()
        pipelined.close()
        server.wait_until(running=1, queued=0, seconds=2)
        flood.sendall(80_000 * b"x")  # more than any request
        server.wait_until(running=0, queued=0, seconds=2)
        assert server.metrics()["cancelled_total"] == 3


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_drain(archive: Path, number: int) -> None:
    with served(archive) as server:
        idle = socket.create_connection(("127.0.0.1", server.port))
        clients = [server.send(seed=seed, budget=LONG) for seed in range(SLOTS + 2)]
        server.wait_until(running=SLOTS, queued=2)
        server.process.send_signal(number)
        end = time.monotonic() + 20
        while server.ask("GET", "/health")[0] == 200:
            assert time.monotonic() < end
        status, headers, answer = server.ask("GET", "/health")
        assert (status, answer, headers["Connection"]) == (503, {"status": "draining"}, "close")
        status, headers, _ = server.generate()
        assert (status, headers["Retry-After"]) == (503, "1")
        assert [status_of(client) for client in clients] == [200] * (SLOTS + 2)
        assert server.process.wait(20) == 0
        assert server.process.stderr is not None
        assert server.process.stderr.read() == ""
        assert idle.recv(1) == b""
        with pytest.raises(ConnectionRefusedError):
            server.ask("GET", "/health")


def test_drain_of_an_idle_server(archive: Path) -> None:
    with served(archive) as server:
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(20) == 0


def test_a_second_signal_ends_it(archive: Path) -> None:
    with served(archive) as server:
        clients = [server.send(n=10) for _ in range(5)]
        server.wait_until(running=SLOTS, queued=50 - SLOTS)
        server.process.send_signal(signal.SIGTERM)
        while server.ask("GET", "/health")[0] == 200:
            time.sleep(0.01)
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == -signal.SIGTERM
        for client in clients:
            client.close()


# ---- many clients ----


def test_many_clients(archive: Path) -> None:
    """Each request gets one answer, 200 or 429; an image is that of its seed, whatever else was under way."""
    seeds = range(4)

    def client(number: int) -> list[tuple[int, int, Any]]:
        found = []
        connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=60)
        for turn in range(6):
            seed = (number + turn) % len(seeds)
            connection.request("POST", GENERATE, json.dumps({"prompt": PROMPT, "budget": SHORT, "seed": seed}), JSON)
            response = connection.getresponse()
            found.append((response.status, seed, json.loads(response.read())))
        connection.close()
        return found

    with served(archive, "--queue", "6") as server:
        alone = [server.generate(seed=seed)[2]["data"][0] for seed in seeds]
        with ThreadPoolExecutor(16) as pool:
            answers = [answer for found in pool.map(client, range(16)) for answer in found]
        statuses = Counter(status for status, _, _ in answers)
        assert set(statuses) == {200, 429}
        assert statuses.total() == 16 * 6
        assert server.answers() == statuses + Counter({200: len(seeds)})
        for status, seed, answer in answers:
            if status == 200:
                image = answer["data"][0]
                assert image["b64_json"] == alone[seed]["b64_json"]
                assert all(image["flowfast"][key] == alone[seed]["flowfast"][key] for key in ("reward", "nfe", "seed"))
        assert server.load() == (0, 0)
