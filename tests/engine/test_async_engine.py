"""The engine's thread: tasks that come, go and are cancelled, loops that close, and a fault that nobody may wait on for
ever."""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.engine.engine import Engine
from flowfast.errors import EngineDeadError, OptionError
from tests.toys import GaussianFlow, NearTarget

SVDD: dict[str, Any] = {"method": "svdd", "budget": 24, "steps": 6}
PATIENCE = 20.0


class Gate(GaussianFlow):
    """Its calls wait where a test closes it, or, until it is opened, after so many."""

    def __init__(self, calls: int = 1 << 30) -> None:
        super().__init__()
        self.calls, self.lock = calls, threading.Lock()
        self.opened, self.reached = threading.Event(), threading.Event()
        self.opened.set()

    def close(self) -> None:
        self.opened.clear()

    def open(self) -> None:
        with self.lock:
            self.calls = 1 << 30
            self.opened.set()

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        with self.lock:
            if self.calls == 0:
                self.opened.clear()
            self.calls -= 1
        if not self.opened.is_set():
            self.reached.set()
            assert self.opened.wait(PATIENCE)
        return super().velocity(x_t, t, cond)


class Running:
    """An engine, and what a test wants to know of it."""

    def __init__(self, flow: GaussianFlow, **options: Any):
        self.flow = flow
        options = {"slots": 2, "micro_batch": 4, "max_budget": 60, **options}
        self.inner = Engine(flow, {"near": NearTarget()}, **options)
        self.engine = flowfast.AsyncEngine(engine=self.inner)

    async def last(self, **params: Any) -> Any:
        return [event async for event in self.engine.generate("a", **{**SVDD, **params})][-1]

    async def at_gate(self) -> None:
        """Until a call of the model waits."""
        assert await asyncio.to_thread(self.flow.reached.wait, PATIENCE)

    async def idle(self) -> None:
        """Until the engine has nothing to do."""
        while self.inner.busy or self.engine._work:
            await asyncio.sleep(0.002)


@contextmanager
def running(flow: GaussianFlow | None = None, **options: Any) -> Iterator[Running]:
    one = Running(flow or GaussianFlow(), **options)
    try:
        yield one
    finally:
        if isinstance(one.flow, Gate):
            one.flow.open()
        one.engine.close()
        assert not one.engine._thread.is_alive()


def in_time(work: Callable[[], Awaitable[Any]]) -> Any:
    async def whole() -> Any:
        done, late = await asyncio.wait([asyncio.ensure_future(work())], timeout=PATIENCE)
        assert not late, "somebody waits for ever"
        return done.pop().result()

    return asyncio.run(whole())


def test_many_tasks_on_one_loop_get_what_they_get_alone() -> None:
    alone = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), micro_batch=4, slots=2, **SVDD).samples[0]
    with running(max_waiting=None) as one:

        async def work() -> list[Any]:
            return await asyncio.gather(*(one.last(seed=seed % 3) for seed in range(60)))

        events = in_time(work)
    assert all(isinstance(event, flowfast.Finished) for event in events)
    assert len({event.id for event in events}) == 60
    for seed, event in enumerate(events):
        assert torch.equal(event.sample.latent, events[seed % 3].sample.latent)
    assert torch.equal(events[0].sample.latent, alone.latent)


def test_what_is_refused_is_raised_in_its_task_and_the_engine_goes_on() -> None:
    with running() as one:

        async def work() -> Any:
            with pytest.raises(OptionError, match="unknown reward"):
                await one.last(reward="far")
            with pytest.raises(OptionError, match="unknown option"):
                await one.last(speed=3)
            return await one.last()

        assert isinstance(in_time(work), flowfast.Finished)


def test_a_cancelled_task_aborts_its_request() -> None:
    with running(Gate(calls=3)) as one:

        async def work() -> None:
            task = asyncio.create_task(one.last(id="mine", budget=60))
            await one.at_gate()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            one.flow.open()
            await one.idle()
            assert int(one.flow.seen) == 4 * 4  # the round that was under way was its last one
            assert isinstance(await one.last(id="mine"), flowfast.Finished)  # its id is free

        in_time(work)


@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_task_that_is_cancelled_before_its_request_was_added_is_no_harm(after: int) -> None:
    """While a round is under way the engine does not answer."""
    flow = Gate()
    with running(flow) as one:

        async def work() -> Any:
            other = asyncio.create_task(one.last(id="other"))
            flow.close()
            await one.at_gate()
            task = asyncio.create_task(one.last(id="cancelled"))
            for _ in range(after):
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            flow.open()
            return await other

        assert isinstance(in_time(work), flowfast.Finished)
        assert not one.inner._jobs


def test_a_loop_that_is_left_early_aborts_its_request() -> None:
    with running(Gate(calls=1)) as one:

        async def work() -> None:
            async for _ in one.engine.generate("a", **{**SVDD, "budget": 60}, id="mine"):
                break
            await asyncio.sleep(0.01)
            one.flow.open()
            await one.idle()

        in_time(work)
        assert int(one.flow.seen) <= 4 * 4 and not one.inner._jobs  # of 60: the first round, and the one under way


def test_two_event_loops_share_an_engine() -> None:
    found: dict[int, list[Any]] = {}
    with running() as one:

        def other(name: int) -> None:
            async def work() -> list[Any]:
                return await asyncio.gather(*(one.last(seed=seed) for seed in range(8)))

            found[name] = in_time(work)

        threads = [threading.Thread(target=other, args=(name,)) for name in (0, 1)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
    for mine, theirs in zip(found[0], found[1], strict=True):
        assert torch.equal(mine.sample.latent, theirs.sample.latent) and mine.id != theirs.id


def test_a_loop_is_woken_once_a_round_whatever_the_number_of_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    steps, woken, heard = 0, 0, 0
    step = Engine.step

    def counted(engine: Engine) -> Any:
        nonlocal steps
        steps += 1
        return step(engine)

    async def work() -> None:
        nonlocal heard
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe

        def counting(*args: Any, **more: Any) -> Any:
            nonlocal woken
            woken += 1
            return wake(*args, **more)

        monkeypatch.setattr(loop, "call_soon_threadsafe", counting)
        found = Running(GaussianFlow(), slots=6)

        async def one(seed: int) -> int:
            return len([event async for event in found.engine.generate("a", **SVDD, seed=seed)])

        heard = sum(await asyncio.gather(*map(one, range(6))))
        monkeypatch.undo()
        found.engine.close()

    monkeypatch.setattr(Engine, "step", counted)
    asyncio.run(work())
    assert heard > 2 * (steps + 6)
    assert woken <= steps + 6  # and once for each request that was taken on


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # of the task that was left
def test_a_loop_that_was_closed_without_a_word_leaves_no_request_behind() -> None:
    flow = Gate(calls=3)
    with running(flow) as one:
        loop, tasks = asyncio.new_event_loop(), list[Any]()

        async def begin() -> None:
            tasks.append(asyncio.create_task(one.last(budget=60)))
            await one.at_gate()

        loop.run_until_complete(begin())
        loop.close()
        flow.open()

        assert isinstance(in_time(one.last), flowfast.Finished)
        in_time(one.idle)
        assert int(flow.seen) <= 4 * (5 + 24) and not one.inner._jobs and not one.engine._listeners
    tasks.clear()
    gc.collect()  # its task complains that its loop is closed


# ---- its end ----


def test_a_drain_waits_for_all_and_every_drain_hears_of_it() -> None:
    with running() as one:

        async def work() -> list[Any]:
            tasks = [asyncio.create_task(one.last(seed=seed)) for seed in range(6)]
            await asyncio.sleep(0.02)
            await asyncio.gather(one.engine.drain(), one.engine.drain(), one.engine.drain(seconds=PATIENCE))
            with pytest.raises(OptionError, match="no more requests"):
                await one.last()
            await one.engine.drain()
            return await asyncio.gather(*tasks)

        assert all(isinstance(event, flowfast.Finished) for event in in_time(work))


def test_what_a_drain_has_no_time_for_is_aborted() -> None:
    flow = Gate()
    with running(flow) as one:

        async def work() -> Any:
            flow.close()
            task = asyncio.create_task(one.last())
            await one.at_gate()
            asyncio.get_running_loop().call_later(0.2, flow.open)
            await one.engine.drain(seconds=0.05)
            return await task

        event = in_time(work)
        assert isinstance(event, flowfast.Failed) and event.reason == "aborted"


def test_a_closed_engine_tells_those_who_wait_and_refuses_the_others() -> None:
    flow = Gate()
    with running(flow) as one:

        async def work() -> list[Any]:
            flow.close()
            tasks = [asyncio.create_task(one.last(seed=seed)) for seed in range(3)]
            await one.at_gate()
            asyncio.get_running_loop().call_later(0.05, flow.open)
            await asyncio.to_thread(one.engine.close)
            with pytest.raises(EngineDeadError, match="it was closed"):
                await one.last()
            with pytest.raises(EngineDeadError):
                await one.engine.drain()
            one.engine.abort("nobody")
            return await asyncio.gather(*tasks, return_exceptions=True)

        for event in in_time(work):
            error = event.error if isinstance(event, flowfast.Failed) else event
            assert isinstance(error, EngineDeadError)


@pytest.mark.parametrize("also", ["nothing", "a drain", "a snapshot", "one more request"])
def test_nobody_waits_for_an_engine_that_died(also: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A fault of the program itself, while others wait for rounds, for an answer, or for the end."""
    flow = Gate()
    with running(flow) as one:
        step = Engine.step
        rounds = 0

        def dies(self: Engine) -> list[Any]:
            nonlocal rounds
            rounds += 1
            found = step(self)
            if rounds == 3:
                raise ZeroDivisionError("a fault of the engine")
            return found

        monkeypatch.setattr(Engine, "step", dies)

        async def work() -> list[Any]:
            flow.close()
            tasks: list[Any] = [asyncio.create_task(one.last(seed=seed)) for seed in range(5)]
            await one.at_gate()
            if also == "a drain":
                tasks.append(asyncio.create_task(one.engine.drain()))
            elif also == "a snapshot":
                tasks.append(asyncio.create_task(one.engine.snapshot(tmp_path / "state")))
            elif also == "one more request":
                tasks.append(asyncio.create_task(one.last()))
            await asyncio.sleep(0.01)
            flow.open()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            with pytest.raises(EngineDeadError, match="ZeroDivisionError: a fault of the engine"):
                await one.last()
            return found

        found = in_time(work)
        errors = [event.error if isinstance(event, flowfast.Failed) else event for event in found]
        assert all(isinstance(error, EngineDeadError) for error in errors[:5])
        assert also != "a drain" or isinstance(errors[5], EngineDeadError)


def test_a_drain_that_comes_as_the_engine_dies_does_not_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks while the last round is under way."""
    flow = Gate()
    with running(flow) as one:
        step = Engine.step

        def dies(self: Engine) -> list[Any]:
            step(self)
            raise ZeroDivisionError("a fault of the engine")

        monkeypatch.setattr(Engine, "step", dies)

        async def work() -> None:
            flow.close()
            task = asyncio.create_task(one.last())
            await one.at_gate()
            drains = [asyncio.create_task(one.engine.drain(seconds)) for seconds in (None, 0.05, None)]
            await asyncio.sleep(0.2)
            flow.open()
            found = await asyncio.gather(task, *drains, return_exceptions=True)
            assert all(isinstance(each, EngineDeadError) for each in found[1:])
            assert found[0].reason == "closed"

        in_time(work)


def test_a_snapshot_that_nobody_waits_for_any_more_is_no_harm(tmp_path: Path) -> None:
    flow = Gate()
    with running(flow) as one:

        async def work() -> Any:
            flow.close()
            other = asyncio.create_task(one.last())
            await one.at_gate()
            task = asyncio.create_task(one.engine.snapshot(tmp_path / "state"))
            await asyncio.sleep(0.01)
            task.cancel()
            flow.open()
            return await other

        assert isinstance(in_time(work), flowfast.Finished)


def test_hundreds_of_tasks_that_come_and_are_cancelled_at_any_time_leave_nothing_behind() -> None:
    with running(max_waiting=None) as one:

        async def work() -> None:
            tasks = []
            for number in range(200):
                tasks.append(asyncio.create_task(one.last(seed=number)))
                if number % 7 == 0:
                    await asyncio.sleep(0.001)
                if number % 2:
                    tasks[number // 2].cancel()
            found = await asyncio.gather(*tasks, return_exceptions=True)
            ended = [event for event in found if isinstance(event, flowfast.Finished)]
            gone = [event for event in found if isinstance(event, asyncio.CancelledError)]
            assert len(ended) + len(gone) == 200 and len(ended) >= 100
            await one.idle()

        start = time.perf_counter()
        in_time(work)
        assert time.perf_counter() - start < PATIENCE
        assert not one.inner._jobs and not one.engine._listeners and one.engine._death is None
