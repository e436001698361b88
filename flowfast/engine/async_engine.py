"""An engine on a thread of its own, for asyncio."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import Any

from torch import Tensor

from flowfast.engine.engine import Engine, whole
from flowfast.engine.request import Event, Failed, Finished
from flowfast.engine.standing import Looks, Standing, best_so_far, standing_of
from flowfast.errors import EngineDeadError, FlowfastError

Listener = Callable[[Event], None]


class AsyncEngine:
    """`Engine` for servers: its thread alone runs the model, any number of tasks wait for their events.

        engine = flowfast.AsyncEngine("scenes", reward="scenes", slots=16, micro_batch=16)
        async for event in engine.generate("two red circles", method="svdd", budget=200):
            if isinstance(event, flowfast.Finished):
                event.sample.image
        await engine.drain(seconds=30)

    A task that is cancelled, or leaves its loop early, aborts its request. Takes what `Engine` takes, or an engine that
    nobody else will touch; turn: held while its thread works, where several engines share a device.
    """

    def __init__(
        self, *args: Any, engine: Engine | None = None, turn: AbstractContextManager[Any] | None = None, **options: Any
    ):
        self._turn = nullcontext() if turn is None else turn
        self._work: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._listeners: dict[str, Listener] = {}
        self._told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Event], Event]]] = {}
        self._drains: list[Future[None]] = []
        self._closed = False
        self._death: BaseException | None = None
        self._engine = Engine(*args, **options) if engine is None else engine
        self._thread = threading.Thread(target=self._run, name="flowfast engine", daemon=True)
        self._thread.start()

    # ---- any task ----

    async def generate(self, prompt: str, *, looks: int = 0, **params: Any) -> AsyncGenerator[Event, None]:
        """Events of one request, the last one `Finished` or `Failed`. Takes what `Engine.add_request` takes; raises
        what it raises. looks: so many pictures on the way, as `Partial`, spread over its budget."""
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Event]()

        def hear(event: Event) -> None:
            self._told.setdefault(loop, []).append((events, event))

        listener: Listener = Looks(self._engine, whole(looks, "looks"), hear) if looks else hear
        added = self._ask(lambda: self._add(prompt, params, listener))
        try:
            id = await asyncio.wrap_future(added)
        except asyncio.CancelledError:
            added.add_done_callback(self._abort_added)
            raise
        over = False
        try:
            while not over:
                event = await events.get()
                over = isinstance(event, Finished | Failed)
                yield event
        finally:
            if not over:
                self.abort(id)

    def _abort_added(self, added: Future[str]) -> None:
        if not added.cancelled() and added.exception() is None:
            self.abort(added.result())

    def abort(self, id: str) -> None:
        """Takes a request back; its last event is `Failed`. Nothing happens where none of this id runs or waits."""
        with suppress(EngineDeadError):
            self._ask(lambda: self._engine.abort(id))

    async def drain(self, seconds: float | None = None) -> None:
        """Takes no more requests; returns when those that it has are done. What is not after so many seconds is
        aborted."""
        future: Future[None] = Future()
        with self._wake:
            self._ask(self._engine.stop_admitting)
            self._drains.append(future)
        done = asyncio.wrap_future(future)
        try:
            await asyncio.wait_for(asyncio.shield(done), seconds)
        except TimeoutError:
            self._ask(self._engine.abort_all)
            await done

    async def peek(self, id: str) -> Tensor | None:
        """How a request that runs looks so far: `flowfast.engine.standing.best_so_far`, between two rounds."""
        return await asyncio.wrap_future(self._ask(lambda: best_so_far(self._engine, id)))

    @property
    def standing(self) -> Standing:
        """Counts for those who watch; waits for nothing."""
        return standing_of(self._engine)

    @property
    def rewards(self) -> tuple[str, ...]:
        """Names that requests may give, the first one's default first."""
        return tuple(self._engine.loaded.scorers)

    @property
    def death(self) -> EngineDeadError | None:
        """Why it takes no request any more; None: it does."""
        return self._dead() if self._closed or self._death is not None else None

    async def snapshot(self, path: Any) -> None:
        """As `Engine.snapshot`, between two rounds."""
        await asyncio.wrap_future(self._ask(lambda: self._engine.snapshot(path)))

    async def reload(self) -> None:
        """As `Engine.reload`: after `drain` and a change of the model."""
        await asyncio.wrap_future(self._ask(self._engine.reload))

    def close(self) -> None:
        """Ends the thread after the round that is under way; requests that run hear `Failed`."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        self._thread.join()

    async def __aenter__(self) -> AsyncEngine:
        return self

    async def __aexit__(self, *_: object) -> None:
        await asyncio.to_thread(self.close)

    # ---- its thread ----

    def _add(self, prompt: str, params: dict[str, Any], hear: Listener) -> str:
        id = self._engine.add_request(prompt, **params)
        self._listeners[id] = hear
        return id

    def _ask(self, work: Callable[[], Any]) -> Future[Any]:
        """What `work` answers or raises, between two rounds; it is not done where nobody waits for it any more."""
        future: Future[Any] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                if self._closed or self._death is not None:
                    raise self._dead()
                future.set_result(work())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._closed or self._death is not None:
                raise self._dead()
            self._work.append(run)
            self._wake.notify()
        return future

    def _dead(self) -> EngineDeadError:
        why = "it was closed" if self._death is None else f"{type(self._death).__name__}: {self._death}"
        return EngineDeadError(f"this engine runs no more ({why}): make a new one")

    def _run(self) -> None:
        try:
            while self._wait():
                with self._turn:
                    while self._work:
                        self._work.popleft()()
                    if self._engine.busy:
                        self._tell(self._engine.step())
                with self._wake:
                    if self._drains and not self._work and not self._engine.busy:
                        self._end_drains()
        except BaseException as error:  # a fault that no request owns: nobody may wait for ever
            self._death = error
        finally:
            self._end()

    def _wait(self) -> bool:
        with self._wake:
            while not (self._closed or self._work or self._engine.busy):
                self._wake.wait()
            return not self._closed

    def _tell(self, events: list[Event]) -> None:
        for event in events:
            over = isinstance(event, Finished | Failed)
            hear = self._listeners.pop(event.id, None) if over else self._listeners.get(event.id)
            if hear is not None:
                try:
                    hear(event)
                except RuntimeError:  # a look at it failed
                    self._take_back(event.id)
        told, self._told = self._told, {}
        for loop, heard in told.items():  # it is woken once a round, whatever the number of its requests
            try:
                loop.call_soon_threadsafe(put_all, heard)
            except RuntimeError:  # it is closed
                for _, event in heard:
                    self._take_back(event.id)

    def _take_back(self, id: str) -> None:
        """Nobody hears of it any more."""
        self._listeners.pop(id, None)
        self._engine.abort(id)

    def _end_drains(self, error: FlowfastError | None = None) -> None:
        with self._wake:
            drains, self._drains = self._drains, []
        for drain in drains:
            if drain.set_running_or_notify_cancel():
                drain.set_exception(error) if error else drain.set_result(None)

    def _end(self) -> None:
        with self._wake:
            self._closed = True
            rest, self._work = list(self._work), deque()
        for work in rest:
            work()  # hears that the engine is gone
        error: FlowfastError = self._dead()
        self._tell([Failed(id, "closed", error) for id in list(self._listeners)])
        self._end_drains(error)
        self._engine.close()


def put_all(heard: list[tuple[asyncio.Queue[Event], Event]]) -> None:
    for events, event in heard:
        events.put_nowait(event)
