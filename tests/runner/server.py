"""examples/cpp/server, the program, as tests start and ask it."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from tests.cpp import ROOT

PROGRAM = ROOT / "build/server/flowfast-server"
GENERATE = "/v1/images/generations"
JSON = {"Content-Type": "application/json"}
PROMPT = "three red circles and one blue square"
SLOTS = 2
SHORT, LONG, ENDLESS = 24, 500, 4000  # NFE: some hundredths of a second, about one, and as many as nobody waits for


class Server:
    def __init__(self, process: subprocess.Popen[str], port: int):
        self.process, self.port = process, port

    def ask(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Any:
        """Status, headers, and what the body says."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, headers or {})
            response = connection.getresponse()
            text = response.read().decode()
            is_json = response.headers["Content-Type"] == "application/json" and text
            return response.status, response.headers, json.loads(text) if is_json else text
        finally:
            connection.close()

    def generate(self, **fields: Any) -> Any:
        return self.ask("POST", GENERATE, json.dumps({"prompt": PROMPT, "budget": SHORT} | fields), JSON)

    def send(self, **fields: Any) -> socket.socket:
        """A request whose answer nobody has read yet."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=60)
        body = json.dumps({"prompt": PROMPT, "budget": ENDLESS} | fields)
        client.sendall(f"POST {GENERATE} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n".encode())
        client.sendall(f"Content-Length: {len(body)}\r\n\r\n{body}".encode())
        return client

    def raw(self, data: bytes) -> bytes:
        """All that the server says to it until it closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as client:
            client.sendall(data)
            return b"".join(iter(lambda: client.recv(4096), b""))

    def metrics(self) -> dict[str, float]:
        status, headers, text = self.ask("GET", "/metrics")
        assert status == 200
        assert headers["Content-Type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        return {name.removeprefix("flowfast_"): float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    def answers(self) -> Counter[int]:
        """Answers to requests for images, by status."""
        start = f'requests_total{{route="{GENERATE}",status="'
        return Counter(
            {int(name[len(start) : -2]): int(n) for name, n in self.metrics().items() if name.startswith(start)}
        )

    def wait_until(self, running: int, queued: int, seconds: float = 20) -> None:
        end = time.monotonic() + seconds
        while (found := self.load()) != (running, queued):
            assert time.monotonic() < end, f"{found} searches run and wait, not {running, queued}"
            time.sleep(0.002)

    def load(self) -> tuple[float, float]:
        metrics = self.metrics()
        return metrics["slots_running"], metrics["queue_length"]


def start(archive: Path, *options: str) -> subprocess.Popen[str]:
    argv = [str(PROGRAM), str(archive), "--port", "0", "--threads", "1", *options]
    return subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@contextmanager
def served(archive: Path, *options: str) -> Iterator[Server]:
    with start(archive, *options) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            place, _, port = line.strip().rpartition(":")
            assert place == f"{archive} at http://127.0.0.1", line  # nobody else's unless it is told so
            yield Server(process, int(port))
        finally:
            process.kill()


def pixels(image: dict[str, Any]) -> Tensor:
    decoded = Image.open(io.BytesIO(base64.b64decode(image["b64_json"], validate=True)))
    assert decoded.format == "PNG"
    return torch.frombuffer(bytearray(decoded.tobytes()), dtype=torch.uint8).view(decoded.height, decoded.width, 3)
