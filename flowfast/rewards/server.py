"""A reward over HTTP, the other end of http.py: `flowfast reward-server --reward NAME`.

One process, one reward; batches are scored one after the other, in the order in which they have come. What waits costs
little: a body is read once there is room for it among all bodies that are held (MAX_BODY bytes together), images
become numbers a few at a time once the turn has come, and a client that leaves takes its batch with it.

GET /health answers at any time. With a key in FLOWFAST_REWARD_KEY (or in the file that FLOWFAST_REWARD_KEY_FILE names)
POST /score wants it as Authorization: Bearer; without one the server belongs on a private network.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import math
import socket
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import nn

from flowfast import secrets
from flowfast.errors import FlowfastError, OptionError, PromptError, RewardError
from flowfast.rewards.combine import all_scores
from flowfast.rewards.host import MOST_IMAGES, parts_of
from flowfast.rewards.http import TooLarge, authorization_of, unpack
from flowfast.rewards.worker import Worker

try:
    import uvicorn
    from uvicorn.protocols.http.h11_impl import H11Protocol
except ImportError as error:
    raise OptionError(f"the reward server needs {error.name}: pip install 'flowfast[server]'") from None

MAX_BODY = 256 * 2**20
"""Bytes of a request, more than 80 images of 1024 x 1024, and of all that are held at once."""
MAX_DISCARD = 4 * MAX_BODY
"""Bytes of a refused request that are still read."""
MAX_REQUESTS = 512
"""Requests that are scored or wait; further ones are told when to come back."""
PATIENCE = 30.0
"""Seconds a client may be silent within a request, or between two, before its connection is closed."""
SLOWEST = 2**19
"""Bytes a second that a body has to come with, beside PATIENCE: it holds room that others wait for."""
GRACE = 5.0
"""Seconds that requests have to be answered once the server is told to stop."""


class RewardServer:
    """Listens at once; `serve_forever()` answers.

    Args:
        reward: a name, or whatever `flowfast.rewards.load` takes.
        port: 0: any free one, see `url`.
        max_body: bytes of a request; larger ones are refused.

    Raises:
        OptionError: the address cannot be listened on, an unknown reward, or a key that no header can hold.
    """

    def __init__(self, reward: Any, host: str = "127.0.0.1", port: int = 8000, max_body: int = MAX_BODY) -> None:
        from flowfast.rewards import load

        self.reward = load(reward)
        self.name = str(getattr(self.reward, "name", type(self.reward).__name__))
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        if isinstance(self.reward, nn.Module):
            self.reward = self.reward.to(self.device).eval()
        keyed = secrets.value_of(secrets.KEY) is not None
        self.authorization = authorization_of(f"${{{secrets.KEY}}}") if keyed else None
        self.max_body, self.room = max_body, Room(max_body)
        self.requests, self.pace = 0, 0.0  # under way; seconds of the last batch
        self.worker = Worker(f"reward {self.name}")
        self.socket = listen(host, port)
        self.server = uvicorn.Server(config_of(self, lifespan="off"))

    @property
    def url(self) -> str:
        return url_of(self.socket)

    def serve_forever(self) -> None:
        """Answers until SIGINT, SIGTERM or `shutdown()`; what was asked before is answered, within GRACE seconds."""
        self.server.run(sockets=[self.socket])

    def shutdown(self) -> None:
        """Makes `serve_forever` return, from another thread."""
        self.server.should_exit = True

    # ---- a request ----

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """The ASGI application."""
        asked = f"{scope['method']} {scope['path']}"
        if asked in ("GET /health", "HEAD /health"):
            return await answer(send, 200, {"status": "ok", "reward": self.name})
        headers, receive = dict(scope["headers"]), Incoming(receive)
        told = b"content-length" in headers and b"transfer-encoding" not in headers
        size = int(headers[b"content-length"]) if told else 0
        try:
            self.check(asked, size, headers.get(b"authorization", b""))
            self.requests += 1
            try:
                async with self.room.held(size if told else self.max_body):
                    body = await body_of(receive, size, self.max_body)
                    found = await self.in_turn(body, receive)
            finally:
                self.requests -= 1
        except ClientLeft:
            return None
        except Refused as refused:
            return await answer(send, refused.status, {"error": str(refused)}, refused.headers, unread=receive)
        await answer(send, *found)

    def check(self, asked: str, size: int, authorization: bytes) -> None:
        """Raises Refused where nothing of the body need be read."""
        if asked != "POST /score":
            raise Refused(404, f"expected GET /health or POST /score, got {asked}")
        if self.authorization and not hmac.compare_digest(authorization, self.authorization.encode()):
            missing = f"expected Authorization: Bearer with the key of this server ({secrets.KEY})"
            raise Refused(401, missing, {"WWW-Authenticate": "Bearer"})
        if size > self.max_body:
            raise too_large(size, self.max_body)
        if self.requests >= MAX_REQUESTS:
            wait = max(1, math.ceil(self.pace * self.requests))
            why = f"{self.requests} requests wait; ask again in {wait} s"
            raise Refused(503, why, {"Retry-After": str(wait)})

    async def in_turn(self, body: bytearray, receive: Incoming) -> tuple[int, dict[str, Any]]:
        """Status and content of the answer to a whole request. Raises ClientLeft."""
        scored = asyncio.wrap_future(self.worker.submit(partial(self.scores, body)))
        left = asyncio.ensure_future(disconnect(receive))
        await asyncio.wait([scored, left], return_when=asyncio.FIRST_COMPLETED)
        left.cancel()
        if not scored.done():
            scored.cancel()  # where it has not begun, it never will
            raise ClientLeft
        try:
            return 200, {"scores": scored.result()}
        except TooLarge as error:
            return 413, {"error": str(error)}
        except Malformed as error:
            return 400, {"error": str(error)}
        except FlowfastError as error:
            return 500, {"error": str(error)}
        except Exception as error:
            return 500, {"error": f"{type(error).__name__}: {error}"}

    def scores(self, body: bytearray) -> list[float | None]:
        """The scores that a request asks for; None where one is not finite, which JSON cannot say.

        Raises:
            Malformed: the client sent what cannot be scored. TooLarge. RewardError: the reward failed.
        """
        begun, found = time.monotonic(), []
        try:
            pixels, prompts = unpack(body)
        except TooLarge:
            raise
        except RewardError as error:
            raise Malformed(str(error)) from None
        try:
            with torch.no_grad():
                for part in parts_of(pixels, MOST_IMAGES):
                    images = pixels[part].to(self.device).float().div_(255)
                    found += all_scores([self.reward], images, prompts[part], None)[0].tolist()
        except PromptError as error:
            raise Malformed(str(error)) from None
        self.pace = time.monotonic() - begun
        return [score if math.isfinite(score) else None for score in found]


class Incoming:
    """The messages of a request; `ended`: nothing is to come but the client's leaving."""

    def __init__(self, receive: Any) -> None:
        self.receive, self.ended = receive, False

    async def __call__(self) -> Any:
        message = await self.receive()
        self.ended = not message.get("more_body", False)
        return message


class Malformed(RewardError):
    """The request is at fault, not the reward."""


class ClientLeft(Exception):
    """Nobody is left to answer."""


class Refused(Exception):
    """A request whose body is not wanted, or not any more."""

    def __init__(self, status: int, why: str, headers: dict[str, str] | None = None) -> None:
        super().__init__(why)
        self.status, self.headers = status, headers


def too_large(size: int, most: int) -> Refused:
    return Refused(413, f"expected at most {most} bytes, got {size}; send fewer images at once")


class Room:
    """Bytes that bodies may take together; who came first is served first."""

    def __init__(self, size: int) -> None:
        self.left = size
        self.waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @asynccontextmanager
    async def held(self, size: int) -> AsyncIterator[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.waiting.append((size, turn))
        self._admit()
        try:
            await turn
            yield
        finally:
            if not turn.cancelled():
                self.left += size
            self._admit()

    def _admit(self) -> None:
        while self.waiting and (self.waiting[0][1].done() or self.waiting[0][0] <= self.left):
            size, turn = self.waiting.popleft()
            if not turn.done():  # else it was cancelled as it waited
                self.left -= size
                turn.set_result(None)


async def body_of(receive: Incoming, size: int, most: int) -> bytearray:
    """The body of a request. size: what the client says, 0 where it does not say; uvicorn sees to it that no more
    comes. Raises Refused, ClientLeft."""
    body = bytearray()
    try:
        async with asyncio.timeout(PATIENCE + size / SLOWEST):
            while True:
                async with asyncio.timeout(PATIENCE):
                    message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeft
                body += message["body"]
                if len(body) > most:
                    raise too_large(len(body), most)
                if not message["more_body"]:
                    return body
    except TimeoutError:
        raise Refused(408, f"{len(body)} bytes of the request came in time: send faster, or fewer images") from None


async def disconnect(receive: Any) -> None:
    """Returns once the client has left; the body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def answer(
    send: Any,
    status: int,
    content: dict[str, Any],
    headers: dict[str, str] | None = None,
    unread: Incoming | None = None,
) -> None:
    """Sends it; then reads the rest of the request: a client that is cut off as it sends sees no answer."""
    body = json.dumps(content).encode()
    sent = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    if unread:
        sent["connection"] = "close"
    raw = [(name.lower().encode(), value.encode()) for name, value in sent.items()]
    await send({"type": "http.response.start", "status": status, "headers": raw})
    await send({"type": "http.response.body", "body": body, "more_body": True})
    left = MAX_DISCARD
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE):
            while unread and not unread.ended and left > 0:
                left -= len((await unread()).get("body", b""))
    await send({"type": "http.response.body", "body": b"", "more_body": False})


class Impatient(H11Protocol):
    """uvicorn would wait for ever for the head of a request, once a first byte of it has come, and for a client that
    reads nothing of its answer."""

    stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self.timeout_keep_alive_task = self.loop.call_later(PATIENCE, self.timeout_keep_alive_handler)

    def data_received(self, data: bytes) -> None:
        self.conn.receive_data(data)
        self.handle_events()  # a whole head stops the clock

    def pause_writing(self) -> None:
        super().pause_writing()
        self.stalled = self.loop.call_later(PATIENCE, self.transport.abort)

    def resume_writing(self) -> None:
        self.reads()
        super().resume_writing()

    def connection_lost(self, exc: Exception | None) -> None:
        self.reads()
        super().connection_lost(exc)

    def reads(self) -> None:
        """What was written is on its way."""
        if self.stalled is not None:
            self.stalled.cancel()
            self.stalled = None


def listen(host: str, port: int) -> socket.socket:
    """A socket for a server. Raises OptionError."""
    try:
        place = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OptionError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    # asyncio sets it for sockets that name their protocol alone, and an answer would wait 40 ms for the client's ACK.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return place


def url_of(place: socket.socket) -> str:
    host, port = place.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def config_of(app: Any, **other: Any) -> uvicorn.Config:
    """uvicorn's, of a server that waits for nobody for ever."""
    return uvicorn.Config(
        app,
        interface="asgi3",
        http=Impatient,
        ws="none",
        loop="asyncio",
        log_config=None,
        log_level="critical",  # a line a request would be thousands
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(PATIENCE),
        timeout_graceful_shutdown=int(GRACE),
        **other,
    )


def serve(reward: Any, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serves `reward` until Ctrl-C or SIGTERM. Raises OptionError: see RewardServer."""
    server = RewardServer(reward, host, port)
    print(f"reward {server.name} at {server.url}/score; Ctrl-C stops it", flush=True)
    server.serve_forever()
