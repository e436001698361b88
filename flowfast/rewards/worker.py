"""A thread for work that may hang."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any


class Worker:
    """Does one piece of work after the other, on a daemon thread.

    A ThreadPoolExecutor is waited for, where it is left and again as the program ends, so that work that hangs, such as
    a reward without an answer, would keep its own deadline and Ctrl-C waiting. Nobody waits for this one.
    """

    def __init__(self, name: str) -> None:
        self._queue: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """What `work` returns or raises, as soon as its turn has come."""
        future: Future[Any] = Future()
        self._queue.put((work, future))
        return future

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        """Work that has not begun is cancelled; what runs is left behind."""
        try:
            while True:
                if job := self._queue.get_nowait():
                    job[1].cancel()
        except Empty:
            self._queue.put(None)

    def _run(self) -> None:
        while job := self._queue.get():
            work, future = job
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(work())
            except BaseException as error:  # also SystemExit: it belongs to whoever waits
                future.set_exception(error)
            del job, work, future  # or they would live until the next one comes
