"""`flowfast serve`: the socket, the signals, and the end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType
from typing import Any

from flowfast import secrets
from flowfast.errors import OptionError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn
except ImportError as error:
    raise OptionError(f"`flowfast serve` needs {error.name}: pip install 'flowfast[serve]'") from None

from flowfast.rewards.server import GRACE, PATIENCE, Impatient
from flowfast.serve.app import create_app
from flowfast.serve.config import KEY, ServeConfig, check_open
from flowfast.serve.serving import Serving

MOST_CONNECTIONS = 4096


class Server(uvicorn.Server):
    """uvicorn's, which closes its socket at the first SIGTERM; this one answers /ready and drains before that. The
    second signal ends it at once."""

    def __init__(self, serving: Serving, key: str | None):
        self.serving = serving
        self.loop: asyncio.AbstractEventLoop | None = None
        app: Any = create_app(serving, key)
        super().__init__(
            uvicorn.Config(
                app, interface="asgi3", http=Impatient, ws="none", loop="asyncio", lifespan="on", log_config=None,
                log_level="critical", access_log=False, server_header=False, limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=int(PATIENCE), timeout_graceful_shutdown=int(GRACE),
            )
        )  # fmt: skip
        serving.on_loaded = self._loaded

    def _loaded(self) -> None:
        if self.serving.failure is not None:
            self.should_exit = True
        elif self.serving.phase == "ready":
            print("ready", flush=True)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.loop = asyncio.get_running_loop()
        await super().startup(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.serving.phase == "draining" or self.serving.phase == "failed":
            self.should_exit = self.force_exit = True
            return super().handle_exit(sig, frame)
        self.serving.stop_admitting()
        if self.loop is None:
            self.should_exit = True
            return
        self.loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.ensure_future(self.serving.drain())
        self._draining.add_done_callback(lambda _: setattr(self, "should_exit", True))


def listen(host: str, port: int) -> socket.socket:
    """Raises OptionError."""
    try:
        place = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise OptionError(f"cannot listen on {host}:{port}: {error}; choose another --host or --port") from None
    # asyncio sets it for sockets that name their protocol alone, and an answer would wait 40 ms for the client's ACK.
    place.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return place


def serve(config: ServeConfig, key: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Raises OptionError: see `check_open` and `listen`, and what loading raises."""
    if key is not None:
        secrets.GIVEN[KEY] = key  # hidden from errors
    key = secrets.value_of(KEY)
    check_open(config, key)
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    logging.getLogger("flowfast.serve").setLevel(logging.INFO)
    place = listen(config.host, config.port)
    host, port = place.getsockname()[:2]
    serving = Serving(config)
    server = Server(serving, key)
    url = f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
    print(f"{config.models[0]} at {url}/v1; Ctrl-C stops it", flush=True)
    server.run(sockets=[place])
    if serving.failure is not None:
        raise serving.failure
