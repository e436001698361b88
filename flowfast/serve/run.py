"""`flowfast serve`: the socket, the signals, and the end."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys
from types import FrameType
from typing import Any

import torch

from flowfast import secrets
from flowfast.errors import OptionError

try:
    import fastapi  # noqa: F401
    import prometheus_client  # noqa: F401
    import uvicorn
except ImportError as error:
    raise OptionError(f"`flowfast serve` needs {error.name}: pip install 'flowfast[serve]'") from None

from flowfast.rewards.server import config_of, listen, url_of
from flowfast.serve.app import create_app
from flowfast.serve.config import KEY, ServeConfig, check_open
from flowfast.serve.security import Lines
from flowfast.serve.serving import Serving

MOST_CONNECTIONS = 4096


class Server(uvicorn.Server):
    """uvicorn's, which closes its socket at the first SIGTERM; this one answers /ready and drains before that. The
    second signal ends it at once."""

    def __init__(self, serving: Serving, key: str | None):
        self.serving = serving
        self.loop: asyncio.AbstractEventLoop | None = None
        app: Any = create_app(serving, key)
        super().__init__(config_of(app, lifespan="on", limit_concurrency=MOST_CONNECTIONS))
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


def serve(config: ServeConfig, key: str | None = None) -> None:
    """Serves until SIGINT or SIGTERM. Raises OptionError: see `check_open` and `listen`, and what loading raises."""
    if key is not None:
        secrets.GIVEN[KEY] = key  # hidden from errors
    key = secrets.value_of(KEY)
    check_open(config, key)
    lines = logging.StreamHandler(sys.stderr)
    lines.setFormatter(Lines())
    logging.basicConfig(handlers=[lines], level=logging.WARNING)
    logging.getLogger("flowfast.serve").setLevel(logging.INFO)
    if config.threads is not None and not config.apart:
        torch.set_num_threads(config.threads)
    place = listen(config.host, config.port)
    serving = Serving(config)
    server = Server(serving, key)
    print(f"{config.models[0]} at {url_of(place)}/v1; Ctrl-C stops it", flush=True)
    server.run(sockets=[place])
    if serving.failure is not None:
        raise serving.failure
