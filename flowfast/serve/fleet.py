"""Several engines, one process each, behind one door: who gets which request, and what happens when one dies."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

from flowfast import secrets
from flowfast.engine.request import Event, Failed, Finished, Progress
from flowfast.engine.standing import Standing
from flowfast.errors import AbortedError, DeadlineError, EngineDeadError, OptionError
from flowfast.serve.child import GRACE, Child
from flowfast.serve.config import ServeConfig
from flowfast.serve.engines import Engines, Restarted, added
from flowfast.serve.worker import Setup, engine_of

log = logging.getLogger("flowfast.serve")
START_SECONDS = 1800.0
"""How long an engine may take to load."""
MOST_DEATHS = 5
"""Of one engine in a row, without a request that it has finished: then the fleet is given up."""
MOST_STARTS = 3
"""Of one request: it may be the one that engines die of."""
WAITS = (0.0, 1.0, 4.0, 15.0)
"""Seconds before an engine is started again after its first, second, ... death in a row."""
NOTHING = Standing(**dict.fromkeys([each.name for each in fields(Standing)], 0))


@dataclass(eq=False)
class Seat:
    """The place of one engine, which several may have one after the other."""

    number: int
    child: Child | None = None
    up: bool = False
    """Does it take requests?"""
    deaths: int = 0
    """In a row."""
    restarts: int = 0
    why: str = ""
    """The last words of the engine."""
    now: Standing = NOTHING
    past: Standing = NOTHING
    """Of the engines that have died."""


@dataclass(eq=False)
class Open:
    """A request that has not ended."""

    id: str
    prompt: str
    options: dict[str, Any]
    arrived: float
    left: int
    """NFE that it may still take."""
    events: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    seat: Seat | None = None
    begun: float = 0.0
    """When its engine got it."""
    starts: int = 0


class Fleet:
    """An `Engines` of several; one event loop's own. `start` it first.

    Args:
        config: says how many, and what each is.
        make: makes one, in its process: a function of a module.
    """

    def __init__(self, config: ServeConfig, make: Callable[[ServeConfig], Engines] = engine_of):
        self.config, self.make = config, make
        self.seats = [Seat(number) for number in range(config.count)]
        self.rewards: tuple[str, ...] = ()
        self.sizes: tuple[str, ...] = ()
        self.death: EngineDeadError | None = None
        self._open: dict[str, Open] = {}
        self._ids = itertools.count()
        self._draining = False
        self._empty = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started: asyncio.Future[None] = self._loop.create_future()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> tuple[str, ...]:
        """Returns the sizes of its pictures once all engines are ready. Raises what the first one raises that is
        not."""
        try:
            await asyncio.gather(*(self._begin(seat) for seat in self.seats))
            async with asyncio.timeout(START_SECONDS):
                await self._started
        except TimeoutError:
            self.close()
            missing = ", ".join(str(seat.number) for seat in self.seats if not seat.up)
            raise OptionError(f"engine {missing} did not start within {START_SECONDS:g} s: see its log") from None
        except BaseException:
            self.close()
            raise
        return self.sizes

    # ---- a request ----

    async def generate(self, prompt: str, *, looks: int = 0, **params: Any) -> AsyncGenerator[Event, None]:
        """As `AsyncEngine.generate`, and `Restarted` where an engine has died."""
        if self.death is not None:
            raise self.death
        if self._draining:
            raise OptionError("these engines take no more requests: they are being drained")
        budget = params.get("budget") or 0
        request = Open(str(next(self._ids)), prompt, {**params, "looks": looks}, time.monotonic(), budget)
        self._open[request.id] = request
        self._send(request)
        try:
            while True:
                event = await request.events.get()
                if isinstance(event, Exception):
                    raise event
                yield event
                if isinstance(event, Finished | Failed):
                    return
        finally:
            self._take_back(request)

    def _send(self, request: Open) -> None:
        """To the engine with the fewest NFE to go; where none is up it waits for one."""
        up = [seat for seat in self.seats if seat.up]
        if not up:
            return
        now, options = time.monotonic(), dict(request.options)
        waited = now - request.arrived
        if options.get("deadline") is not None:
            options["deadline"] -= waited
            if options["deadline"] <= 0:
                late = DeadlineError(f"its deadline passed as it waited for an engine, for {waited:.3g} s: try again")
                return self._end(request, Failed(request.id, "deadline", late))
        seat = min(up, key=self.load_of)
        request.seat, request.begun, request.left = seat, now, request.options.get("budget") or 0
        request.starts += 1
        assert seat.child is not None
        seat.child.send("add", request.id, request.prompt, options)

    def load_of(self, seat: Seat) -> int:
        """NFE that its requests may still take."""
        return sum(request.left for request in self._open.values() if request.seat is seat)

    def _take_back(self, request: Open) -> None:
        """Nobody waits for it any more."""
        if self._forget(request) and request.seat is not None and request.seat.child is not None:
            request.seat.child.send("abort", request.id)

    def _forget(self, request: Open) -> bool:
        """Was it still open?"""
        was = self._open.pop(request.id, None) is not None
        if not self._open:
            self._empty.set()
        return was

    def _end(self, request: Open, last: Event | Exception) -> None:
        self._forget(request)
        request.events.put_nowait(last)

    # ---- what engines tell ----

    async def _begin(self, seat: Seat) -> None:
        """Starts a process for it. Raises OptionError."""
        device = self.config.devices[seat.number] if self.config.devices else None
        setup = Setup(self.config, device, self.config.torch_threads, dict(secrets.GIVEN), self.make)
        seat.why = ""
        seat.child = await asyncio.to_thread(Child, setup, seat.number, self._loop, partial(self._hear, seat))
        if self.death is not None:
            seat.child.end()

    def _hear(self, seat: Seat, what: str, *facts: Any) -> None:
        if self.death is not None:
            return
        match what:
            case "event":
                self._event(seat, *facts)
            case "standing":
                (seat.now,) = facts
            case "refused":
                id, error = facts
                if id in self._open:
                    self._end(self._open[id], error)
            case "ready":
                self.rewards, self.sizes = facts
                seat.up = True
                if not self._started.done() and all(seat.up for seat in self.seats):
                    self._started.set_result(None)
                for request in [request for request in self._open.values() if request.seat is None]:
                    self._send(request)
            case "failed" if not self._started.done():
                self._started.set_exception(facts[0])
            case "failed" | "died":
                seat.why = str(facts[0])
            case "gone":
                self._lost(seat, *facts)

    def _event(self, seat: Seat, event: Event) -> None:
        request = self._open.get(event.id)
        if request is None:
            return
        if isinstance(event, Progress):
            request.left = max(0, event.budget - event.nfe)
        if isinstance(event, Finished):
            seat.deaths = 0
            before = request.begun - request.arrived
            event = replace(event, seconds=event.seconds + before, waited=event.waited + before)
        if isinstance(event, Finished | Failed):
            self._end(request, event)
        else:
            request.events.put_nowait(event)

    # ---- what dies ----

    def _lost(self, seat: Seat, code: int | None) -> None:
        """Its process has ended: requests begin anew, and so does the engine, after a while."""
        why = f"engine {seat.number} died ({seat.why or f'its process ended with exit code {code}'})"
        if not self._started.done():
            return self._started.set_exception(EngineDeadError(f"{why} as it started: see its log"))
        seat.up, seat.child, seat.deaths = False, None, seat.deaths + 1
        seat.now, seat.past = NOTHING, added(seat.past, replace(seat.now, running=0, waiting=0))
        log.warning("%s; death %d in a row", why, seat.deaths)
        if seat.deaths >= MOST_DEATHS:
            return self._give_up(f"{why}, {seat.deaths} times in a row without a request that it finished")
        task = asyncio.ensure_future(self._start_again(seat))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        for request in [request for request in self._open.values() if request.seat is seat]:
            request.seat = None
            if request.starts >= MOST_STARTS:
                text = f"{request.starts} engines died as they ran this request, at last: {why}"
                self._end(request, Failed(request.id, "engine", EngineDeadError(text)))
            else:
                request.events.put_nowait(Restarted(request.id, request.starts))
                self._send(request)

    async def _start_again(self, seat: Seat) -> None:
        await asyncio.sleep(WAITS[min(seat.deaths, len(WAITS)) - 1])
        if self.death is not None:
            return
        seat.restarts += 1
        try:
            await self._begin(seat)
        except Exception as error:
            seat.why = str(error)
            self._lost(seat, None)

    def _give_up(self, why: str) -> None:
        """No request will be taken on again."""
        self.death = EngineDeadError(why)
        for seat in self.seats:
            if seat.child is not None:
                seat.child.end()
        self._end_all()

    def _end_all(self) -> None:
        assert self.death is not None
        for seat in self.seats:
            seat.up = False
        for request in list(self._open.values()):
            self._end(request, Failed(request.id, "closed", self.death))

    # ---- those who watch, and the end ----

    @property
    def standing(self) -> Standing:
        unsent = sum(request.seat is None for request in self._open.values())
        whole = added(*(each for seat in self.seats for each in (seat.past, seat.now)))
        return replace(whole, waiting=whole.waiting + unsent)

    async def drain(self, seconds: float | None = None) -> None:
        self._draining = True
        try:
            async with asyncio.timeout(seconds):
                while self._open:
                    self._empty.clear()
                    await self._empty.wait()
        except TimeoutError:
            for request in list(self._open.values()):
                self._take_back(request)
                aborted = AbortedError(f"request {request.id!r} was aborted: it was not done in time")
                request.events.put_nowait(Failed(request.id, "aborted", aborted))

    def close(self) -> None:
        """From any thread. Processes end at once."""
        self.death = self.death or EngineDeadError("these engines run no more (they were closed): make new ones")
        children = [seat.child for seat in self.seats if seat.child is not None]
        for child in children:
            child.end()
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(self._end_all)
        end = time.monotonic() + GRACE
        for child in children:
            child.ended(max(0.0, end - time.monotonic()))
