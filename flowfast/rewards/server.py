"""A reward over HTTP, the other end of http.py: `flowfast reward-server --reward NAME`.

One process, one reward, no password: it belongs on a private network. Batches are scored one after the other.
"""

from __future__ import annotations

import contextlib
import json
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import nn

from flowfast.errors import FlowfastError, OptionError, PromptError, RewardError
from flowfast.rewards.combine import all_scores
from flowfast.rewards.http import unpack

MAX_BODY = 256 * 2**20
"""Bytes of a request, more than 80 images of 1024 x 1024."""
MAX_DISCARD = 4 * MAX_BODY
"""Bytes of a refused request that are still read."""
PATIENCE = 60.0
"""Seconds a client may be silent within a request before its connection is closed."""


class RewardServer(ThreadingHTTPServer):
    """Listens at once; `serve_forever()` answers.

    Args:
        reward: a name, or whatever `flowfast.rewards.load` takes.
        port: 0: any free one, see `url`.
        max_body: bytes of a request; larger ones are refused.

    Raises:
        OptionError: the address cannot be listened on, or an unknown reward.
    """

    daemon_threads = True

    def __init__(self, reward: Any, host: str = "127.0.0.1", port: int = 8000, max_body: int = MAX_BODY) -> None:
        from flowfast.rewards import load

        self.reward = load(reward)
        self.name = str(getattr(self.reward, "name", type(self.reward).__name__))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(self.reward, nn.Module):
            self.reward = self.reward.to(self.device).eval()
        self.max_body = max_body
        self.turn = threading.Lock()
        try:
            super().__init__((host, port), Handler)
        except (OSError, OverflowError) as error:
            raise OptionError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None

    @property
    def url(self) -> str:
        return f"http://{self.server_address[0]!s}:{self.server_address[1]}"

    def scores(self, body: bytes) -> list[float | None]:
        """The scores that a request asks for; None where one is not finite, which JSON cannot say.

        Raises:
            Malformed: the client sent what cannot be scored. RewardError: the reward failed.
        """
        try:
            images, prompts = unpack(body)
        except RewardError as error:
            raise Malformed(str(error)) from None
        try:
            with self.turn, torch.no_grad():
                (found,) = all_scores([self.reward], images.to(self.device), prompts, None).tolist()
        except PromptError as error:
            raise Malformed(str(error)) from None
        return [score if math.isfinite(score) else None for score in found]


class Malformed(RewardError):
    """The request is at fault, not the reward."""


class Handler(BaseHTTPRequestHandler):
    """GET /health, POST /score."""

    server: RewardServer
    server_version = "flowfast-reward"
    timeout = PATIENCE

    def do_GET(self) -> None:
        if self.path != "/health":
            return self.answer(404, {"error": f"expected GET /health or POST /score, got GET {self.path}"})
        self.answer(200, {"status": "ok", "reward": self.server.name})

    def do_POST(self) -> None:
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdigit()):
            return self.answer(400, {"error": f"expected a Content-Length in bytes, got {length[:80]!r}"})
        size = int(length[:18])
        if self.path.partition("?")[0] != "/score":
            return self.answer(404, {"error": f"expected POST /score, got POST {self.path}"}, unread=size)
        if len(length) > 18 or size > self.server.max_body:
            limit = f"expected at most {self.server.max_body} bytes, got {length[:80]}; send fewer images at once"
            return self.answer(413, {"error": limit}, unread=size)
        try:
            body = self.rfile.read(size)
        except OSError:
            return None  # the client went silent: nobody is left to answer
        if len(body) < size:
            return self.answer(400, {"error": f"expected {size} bytes, as Content-Length says, got {len(body)}"})
        self.answer(*self.reply(body))

    def reply(self, body: bytes) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer to a request."""
        try:
            return 200, {"scores": self.server.scores(body)}
        except Malformed as error:
            return 400, {"error": str(error)}
        except FlowfastError as error:
            return 500, {"error": str(error)}
        except Exception as error:
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def answer(self, status: int, content: dict[str, Any], unread: int = 0) -> None:
        """Sends it; then reads the rest of the request: a client that is cut off as it sends sees no answer."""
        body = json.dumps(content).encode()
        with contextlib.suppress(OSError):  # the client may be gone
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)
            unread = min(unread, MAX_DISCARD)
            while unread > 0 and (part := self.rfile.read(min(unread, 65536))):
                unread -= len(part)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a line a batch would be thousands."""


def serve(reward: Any, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves `reward` until Ctrl-C. Raises OptionError: see RewardServer."""
    with RewardServer(reward, host, port) as server:
        print(f"reward {server.name} at {server.url}/score; Ctrl-C stops it", flush=True)
        server.serve_forever()
