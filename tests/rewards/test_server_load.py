"""The reward server under load: many clients, large ones, slow ones, such as leave; and how it ends."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowfast import secrets
from flowfast.errors import OptionError, RewardError
from flowfast.rewards import server as servers
from flowfast.rewards.http import HttpReward, load, pack
from flowfast.rewards.server import RewardServer
from tests.rewards.servers import running

PIXELS = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
BODY = pack(PIXELS, ["a", "b"])


def lengths(images: Tensor, prompts: list[str]) -> list[float]:
    return [float(image.sum()) + len(prompt) for image, prompt in zip(images, prompts, strict=True)]


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10)


def call(url: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=10)
    connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
    response = connection.getresponse()
    answer = response.read()
    connection.close()
    return response.status, json.loads(answer) if answer else None


# ---- many ----


@pytest.mark.parametrize("clients", [16, 128])
def test_many_clients_at_once(clients: int) -> None:
    """All are answered, each with its own scores; waits follow the work; connections are kept."""
    inside: list[int] = []

    def alone(images: Tensor, prompts: list[str]) -> list[float]:
        inside.append(1)
        time.sleep(0.005)
        assert len(inside) == 1, "two batches at once"
        inside.pop()
        return lengths(images, prompts)

    server = RewardServer(alone, port=0)
    with running(server) as url:
        begin = threading.Barrier(clients)

        def client(i: int) -> float:
            remote, images = HttpReward(url, retries=0), torch.full((3, 3, 4, 4), i % 256 / 255)
            expected = torch.tensor(lengths(images, ["x" * i] * 3))
            begin.wait()
            before = time.perf_counter()
            kept = set()
            for _ in range(3):
                assert torch.equal(remote(images, ["x" * i] * 3), expected)
                kept |= {id(connection) for connection in remote.idle.values()}
            assert len(kept) == 1
            return time.perf_counter() - before

        with ThreadPoolExecutor(clients) as pool:
            seconds = list(pool.map(client, range(clients)))
        assert server.server.server_state.total_requests == 3 * clients
    assert max(seconds) < 20, "today's took up to 61 s for one request"


def test_health_is_answered_while_a_batch_is_scored() -> None:
    begun, end = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: list[str]) -> list[float]:
        begun.set()
        end.wait(20)
        return lengths(images, prompts)

    with running(RewardServer(slow, port=0)) as url, ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(call, url, "POST", "/score", BODY) for _ in range(3)]
        begun.wait(20)
        assert call(url, "GET", "/health") == (200, {"status": "ok", "reward": "slow"})
        assert call(url, "HEAD", "/health") == (200, None)
        assert not any(future.done() for future in waiting)
        end.set()
        assert [future.result() for future in waiting] == [(200, {"scores": [1.0, 1.0]})] * 3


def test_too_many_are_told_when_to_come_back_and_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "MAX_REQUESTS", 2)
    refused: list[int] = []
    check = RewardServer.check

    def counting(self: RewardServer, *request: Any) -> None:
        try:
            check(self, *request)
        except servers.Refused as error:
            refused.append(error.status)
            assert int((error.headers or {})["Retry-After"]) >= 1
            raise

    def slow(images: Tensor, prompts: list[str]) -> list[float]:
        time.sleep(0.3)
        return lengths(images, prompts)

    monkeypatch.setattr(RewardServer, "check", counting)
    with running(RewardServer(slow, port=0)) as url, ThreadPoolExecutor(6) as pool:
        remotes = [HttpReward(url, retries=0) for _ in range(6)]
        found = list(pool.map(lambda remote: remote(torch.zeros(1, 3, 2, 2), ["abc"]).tolist(), remotes))
    assert found == [[3.0]] * 6
    assert set(refused) == {503}


# ---- large ----

SERVES = """
import sys
from flowfast.rewards.server import RewardServer
server = RewardServer(lambda images, prompts: images.flatten(1).amax(1), port=0, max_body=int(sys.argv[1]))
print(server.url, flush=True)
server.serve_forever()
"""


def peak(process: int) -> int:
    """MiB of memory that a process had at most."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    assert found
    return int(found[1]) // 1024


def post_large(url: str, images: int) -> None:
    """A body of so many images of 1024 x 1024, without one of our own: the same bytes again and again."""
    header = json.dumps(
        {
            "__metadata__": {"prompts": json.dumps(["a"] * images)},
            "images": {"dtype": "U8", "shape": [images, 3, 1024, 1024], "data_offsets": [0, images * 3 * 2**20]},
        }
    ).encode()
    piece = bytes(2**20)
    parts = [len(header).to_bytes(8, "little"), header, *[piece] * (3 * images)]
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request("POST", "/score", iter(parts), {"Content-Length": str(sum(map(len, parts)))})
    response = connection.getresponse()
    assert (response.status, len(json.loads(response.read())["scores"])) == (200, images)
    connection.close()


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak of memory is read from /proc")
@pytest.mark.parametrize(
    ("limit", "clients", "images", "most"),
    [
        (24, 8, 5, 300),  # 15 MiB each, a seventh of it in float32 at once
        pytest.param(256, 8, 20, 700, marks=pytest.mark.slow),
        pytest.param(256, 1, 40, 500, marks=pytest.mark.slow),
    ],
)
def test_memory_is_bounded(limit: int, clients: int, images: int, most: int) -> None:
    """MiB beside what the server has without requests: bodies within the limit, and 128 MiB of images in float32 with
    a little for the reward. Before: each body twice, and in float32, for all clients at once."""
    argv = [sys.executable, "-c", SERVES, str(limit * 2**20)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            before = peak(server.pid)
            with ThreadPoolExecutor(clients) as pool:
                list(pool.map(lambda _: post_large(url, images), range(clients)))
            assert peak(server.pid) - before < most
        finally:
            server.kill()


def test_bodies_without_a_length() -> None:
    def parts(count: int) -> Any:
        return (BODY[start : start + count] for start in range(0, len(BODY), count))

    with running(RewardServer("sharpness", port=0, max_body=len(BODY))) as url:
        assert call(url, "POST", "/score", parts(100)) == (200, {"scores": [0.0, 0.0]})
        status, answer = call(url, "POST", "/score", iter([BODY, b"x"]))
        assert (status, f"expected at most {len(BODY)} bytes" in answer["error"]) == (413, True)
        assert call(url, "POST", "/score", BODY)[0] == 200, "the room is free again"


def test_a_length_beside_chunks_is_not_believed() -> None:
    server, seen = RewardServer("sharpness", port=0), []
    held = server.room.held
    server.room.held = lambda size: seen.append(size) or held(size)  # type: ignore[method-assign,func-returns-value]
    with running(server) as url:
        head = b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n"
        with connect(url) as line:
            line.sendall(head + f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n0\r\n\r\n")
            assert line.recv(100).startswith(b"HTTP/1.1 200 ")
    assert seen == [servers.MAX_BODY]


def test_prompts_that_are_too_long_are_sent_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowfast.rewards.http.HEADER_BYTES", 1000)
    with running(RewardServer(lengths, port=0)) as url:
        assert load(url)(torch.zeros(4, 3, 2, 2), ["x" * 500] * 4).tolist() == [500.0] * 4


# ---- slow, and gone ----


def test_silent_clients_are_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "PATIENCE", 0.4)
    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(BODY)}\r\n".encode()
    with running(RewardServer("sharpness", port=0, max_body=len(BODY))) as url, ExitStack() as lines:
        silent, dripping, holding, after = (lines.enter_context(connect(url)) for _ in range(4))
        dripping.sendall(head[:5])
        holding.sendall(head + b"\r\n" + BODY[:10])  # it has all of the room
        time.sleep(0.1)
        after.sendall(head + b"\r\n" + BODY)
        for byte in head[5:25]:
            time.sleep(0.03)
            try:
                dripping.sendall(bytes([byte]))
            except OSError:
                break
        assert silent.recv(1) == b""
        with suppress(ConnectionResetError):
            assert dripping.recv(1) == b""
        said = holding.makefile("rb").read()
        assert said.startswith(b"HTTP/1.1 408 ") and b"10 bytes of the request came in time" in said
        assert after.recv(100).startswith(b"HTTP/1.1 200 ")


def test_who_has_left_is_not_scored() -> None:
    """Neither one that waits for its turn, nor one that waits for room."""
    seen: list[str] = []
    begun, end = threading.Event(), threading.Event()

    def slow(images: Tensor, prompts: list[str]) -> list[float]:
        seen.append(prompts[0])
        begun.set()
        end.wait(20)
        return [0.0] * len(prompts)

    def body(name: str) -> bytes:
        return pack(PIXELS, [name, name])

    head = f"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body('a'))}\r\n\r\n".encode()
    with running(RewardServer(slow, port=0, max_body=2 * len(body("a")))) as url:
        lines = []
        for name in "abcd":  # a is scored, b waits for its turn, c and d for room
            lines.append(connect(url))
            lines[-1].sendall(head + body(name))
            begun.wait(20)
            time.sleep(0.1)
        lines[1].close()
        lines[2].close()
        time.sleep(0.2)
        end.set()
        assert lines[3].recv(100).startswith(b"HTTP/1.1 200 ")
        lines[0].close()
        lines[3].close()
    assert seen == ["a", "d"]


# ---- a key ----


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    secrets.forget()
    monkeypatch.setenv(secrets.KEY, "k3y-0f-ours")
    return "k3y-0f-ours"


def test_a_key(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(RewardServer("sharpness", port=0)) as url:
        assert load(url)(torch.zeros(1, 3, 4, 4), ["a"]).tolist() == [0.0]
        assert call(url, "GET", "/health")[0] == 200
        assert call(url, "POST", "/score", BODY, Authorization=f"Bearer {key}")[0] == 200
        for wrong in ("", "Bearer", "Bearer k3y", f"bearer{key}", f"Basic {key}", f"Bearer {key}x", "Bearer \xff"):
            status, answer = call(url, "POST", "/score", BODY, Authorization=wrong)
            assert (status, key in str(answer)) == (401, False)
        monkeypatch.delenv(secrets.KEY)
        with pytest.raises(RewardError, match="status 401: expected Authorization: Bearer .*set FLOWFAST_REWARD_KEY"):
            load(url)(torch.zeros(1, 3, 4, 4), ["a"])


# ---- the end ----

HANGS = """
import threading
from flowfast.rewards import server
server.GRACE = 1
def slow(images, prompts):
    print("asked", flush=True)
    threading.Event().wait({seconds})
    return [1.5] * len(prompts)
server.serve(slow, port=0)
"""


@pytest.mark.parametrize(("name", "seconds"), [("SIGINT", 0.6), ("SIGTERM", 0.6), ("SIGINT", 60), ("SIGTERM", 60)])
def test_it_ends_at_one_signal(name: str, seconds: float) -> None:
    """What is being scored is answered first, unless it takes too long."""
    heeds = partial(signal.signal, signal.SIGINT, signal.default_int_handler)  # a background job of a shell ignores it
    argv = [sys.executable, "-c", HANGS.replace("{seconds}", str(seconds))]
    with (
        subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heeds) as server,
        ThreadPoolExecutor(1) as pool,
    ):
        try:
            assert server.stdout is not None and server.stderr is not None
            url = server.stdout.readline().split()[3].removesuffix("/score;")
            reply = pool.submit(call, url, "POST", "/score", BODY)
            assert server.stdout.readline() == "asked\n"
            os.kill(server.pid, getattr(signal, name))
            if seconds < 1:
                assert reply.result(20) == (200, {"scores": [1.5, 1.5]})
            else:
                with pytest.raises((OSError, ValueError)):  # the line is cut, or 500 without JSON
                    reply.result(20)
            assert server.wait(20) == -getattr(signal, name)
            said = server.stderr.read()
            assert said.endswith("\nKeyboardInterrupt\n") if name == "SIGINT" else said == "", said
        finally:
            server.kill()


# ---- addresses ----


def test_an_address_of_ipv6() -> None:
    try:
        server = RewardServer("sharpness", host="::1", port=0)
    except OptionError:
        pytest.skip("no IPv6 on this machine")
    with running(server) as url:
        assert url.startswith("http://[::1]:")
        assert load(url)(torch.zeros(1, 3, 4, 4), ["a"]).tolist() == [0.0]


def test_without_uvicorn_the_extra_is_named() -> None:
    program = (
        "import sys; sys.modules['uvicorn'] = None; from flowfast.cli import main; sys.exit(main(['reward-server']))"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr == "flowfast: the reward server needs uvicorn: pip install 'flowfast[server]'\n"
