"""The process of one engine of a fleet, at the other end of its pipe (child.py)."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import torch

from flowfast import secrets
from flowfast.engine.async_engine import AsyncEngine
from flowfast.engine.request import Failed, Finished
from flowfast.engine.sizes import engines_of_sizes
from flowfast.engine.standing import Standing
from flowfast.errors import AbortedError, EngineDeadError, FlowfastError, OptionError
from flowfast.memory import keep_memory
from flowfast.serve.config import ServeConfig
from flowfast.serve.engines import Engines, warm_up
from flowfast.serve.sizes import Sizes
from flowfast.serve.wire import packed

log = logging.getLogger("flowfast.serve")
SIGNALS = (signal.SIGINT, signal.SIGTERM)
TICK = 0.1
"""Seconds between two looks at the engine's counts."""


def engine_of(config: ServeConfig) -> Engines:
    """That of a configuration. Raises FlowfastError."""
    rewards = [config.reward, *config.other_rewards]
    if config.size:
        return Sizes(engines_of_sizes(config.model, rewards, config.size, **config.engine_options))
    return AsyncEngine(config.model, rewards, **config.engine_options)


@dataclass(frozen=True)
class Setup:
    """What a process needs to make its engine; it takes nothing else from its parent but the environment."""

    config: ServeConfig
    device: str | None = None
    """One of --devices; the parent has set CUDA_VISIBLE_DEVICES accordingly."""
    threads: int | None = None
    """Of PyTorch; None: its own number."""
    secrets: dict[str, Any] = field(default_factory=dict, repr=False)
    make: Callable[[ServeConfig], Engines] = engine_of


def work(connection: Connection, setup: Setup) -> None:
    """All that the process does. The parent alone hears signals, and ends it by the pipe."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    secrets.GIVEN.update(setup.secrets)
    keep_memory()
    logging.basicConfig(stream=sys.stderr, format="%(message)s", level=logging.WARNING)
    if setup.threads is not None:
        torch.set_num_threads(setup.threads)
    asyncio.run(Worker(connection, setup).run())


class Worker:
    """Takes ("add", id, prompt, options), ("abort", id), ("close",). Tells ("ready", rewards, sizes) or ("failed",
    error) first, then ("event", event), ("refused", id, error), ("standing", standing), and ("died", text) as its last
    word. Whoever closes the pipe, by dying for instance, ends the process at once."""

    def __init__(self, connection: Connection, setup: Setup):
        self.connection, self.setup = connection, setup
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.told: Standing | None = None

    async def run(self) -> None:
        self.loop = asyncio.get_running_loop()
        threading.Thread(target=self._listen, name="flowfast pipe", daemon=True).start()
        try:
            check_device(self.setup.device)
            self.engine = self.setup.make(self.setup.config)
            sizes = await warm_up(self.engine, self.setup.config)
        except Exception as error:
            if not isinstance(error, FlowfastError):
                log.exception("an engine could not be made")
                error = RuntimeError(f"{type(error).__name__}: {error}")
            self._send("failed", error)
            os._exit(1)
        self._send("ready", self.engine.rewards, sizes)
        while True:
            self._tell_standing()
            if (death := self.engine.death) is not None:
                self._die(death)
            await asyncio.sleep(TICK)

    # ---- its thread ----

    def _listen(self) -> None:
        try:
            while (message := self.connection.recv())[0] != "close":
                self.loop.call_soon_threadsafe(self._do, *message)
        except (EOFError, OSError):
            pass
        os._exit(0)

    # ---- the loop ----

    def _do(self, what: str, id: str, *facts: Any) -> None:
        if what == "add":
            task = self.tasks[id] = asyncio.ensure_future(self._run(id, *facts))
            task.add_done_callback(lambda _: self.tasks.pop(id, None))
        elif id in self.tasks:
            self.tasks[id].cancel()

    async def _run(self, id: str, prompt: str, options: dict[str, Any]) -> None:
        """One request to its end."""
        try:
            async with aclosing(self.engine.generate(prompt, id=id, **options)) as events:
                async for event in events:
                    if isinstance(event, Failed) and event.reason == "closed":
                        self._die(event.error)
                    if isinstance(event, Finished):
                        self._tell_standing()
                    self._send("event", event)
        except EngineDeadError as error:
            self._die(error)
        except FlowfastError as error:
            self._send("refused", id, error)
        except asyncio.CancelledError:
            self._send("event", Failed(id, "aborted", AbortedError(f"request {id!r} was aborted by its caller")))
        except Exception as error:
            log.exception("a request failed")
            self._send("refused", id, RuntimeError(f"{type(error).__name__}: {error}"))

    def _tell_standing(self) -> None:
        now = self.engine.standing
        if now != self.told:
            self.told = now
            self._send("standing", now)

    def _die(self, error: FlowfastError) -> NoReturn:
        self._send("died", str(error))
        os._exit(1)

    def _send(self, *message: Any) -> None:
        try:
            self.connection.send(packed(message))
        except OSError:  # the parent has gone
            os._exit(0)


def check_device(device: str | None) -> None:
    """Raises OptionError where a CUDA device cannot be used."""
    if device is None or not device.startswith("cuda"):
        return
    try:
        torch.empty(0, device="cuda")
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"--devices: {device} cannot be used: {str(error).splitlines()[0]}") from None
