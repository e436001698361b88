"""An engine's process as the server sees it."""

from __future__ import annotations

import asyncio
import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from queue import SimpleQueue
from typing import Any

from flowfast.errors import OptionError
from flowfast.serve.wire import unpacked
from flowfast.serve.worker import SIGNALS, Setup, work

VISIBLE = "CUDA_VISIBLE_DEVICES"
GRACE = 2.0
"""Seconds in which a process that was told to end does."""
_starting = threading.Lock()


class Child:
    """Starts the process. Two threads keep its pipe, so that the loop never waits for it.

    Args:
        hear: called on the loop with each message of the process (see `worker.Worker`); ("gone", exit code) is the
            last one, however it ended.
    """

    def __init__(self, setup: Setup, number: int, loop: asyncio.AbstractEventLoop, hear: Callable[..., None]):
        self.loop, self.hear = loop, hear
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, setup), name=f"flowfast engine {number}")
        with surroundings(setup.device):
            self.process.start()
        theirs.close()
        self._out: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._reader = threading.Thread(target=self._read, name=f"flowfast from engine {number}", daemon=True)
        self._writer = threading.Thread(target=self._write, name=f"flowfast to engine {number}", daemon=True)
        atexit.register(self.process.kill)  # before Python waits for it
        self._reader.start()
        self._writer.start()

    def send(self, *message: Any) -> None:
        self._out.put(message)

    def end(self) -> None:
        """From any thread; see `ended`."""
        self.send("close")

    def ended(self, seconds: float) -> None:
        """Returns once the process has ended, which after so many seconds is made sure of."""
        self._reader.join(seconds)
        if self._reader.is_alive():
            self.process.kill()
            self._reader.join(GRACE)

    def _write(self) -> None:
        with suppress(OSError):  # it has gone, as the reader sees, too
            while (message := self._out.get()) is not None:
                self.connection.send(message)

    def _read(self) -> None:
        try:
            while True:
                self._tell(*unpacked(self.connection.recv()))
        except (EOFError, OSError):
            pass
        finally:
            self.process.kill()  # where the pipe alone broke
            self.process.join()
            atexit.unregister(self.process.kill)
            self._out.put(None)
            self._tell("gone", self.process.exitcode)

    def _tell(self, *message: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.hear, *message)


@contextmanager
def surroundings(device: str | None) -> Iterator[None]:
    """What a process inherits. It sees this device alone: CUDA reads that as it is first used, which an import may do,
    so that the process itself would be late. And it hears no signal until it says so. Raises OptionError: there is no
    such device here."""
    with _starting:
        before, mask = os.environ.get(VISIBLE), signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            if device is not None:
                os.environ[VISIBLE] = visible(device, before)
            yield
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            os.environ.pop(VISIBLE, None)
            if before is not None:
                os.environ[VISIBLE] = before


def visible(device: str, before: str | None) -> str:
    """CUDA_VISIBLE_DEVICES for a process of this device. before: that of this process, by which devices are counted.
    Raises OptionError."""
    if device == "cpu":
        return ""
    number = int(device.partition(":")[2] or 0)
    if before is None:
        return str(number)
    there = [name for name in before.split(",") if name]
    if number >= len(there):
        raise OptionError(f"--devices: {device} is none of the {len(there)} that {VISIBLE} lets this process see")
    return there[number]
