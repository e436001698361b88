"""Which engine of a fleet gets a request, and what happens when one dies: on engines that are no processes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

import pytest
import torch

from flowfast.config import Rerun
from flowfast.engine.request import Event, Failed, Finished, Found, Partial, Progress
from flowfast.errors import DeadlineError, EngineDeadError, OptionError, PromptError
from flowfast.ops.checks import OperandError
from flowfast.serve import fleet as fleets
from flowfast.serve.child import visible
from flowfast.serve.config import ServeConfig
from flowfast.serve.engines import Restarted
from flowfast.serve.fleet import MOST_DEATHS, NOTHING, Fleet
from flowfast.serve.serving import Serving
from flowfast.serve.wire import packed, unpacked
from flowfast.types import Candidate, Ranked, Sample, Winner
from tests.serve.conftest import Server, in_time

IMAGE = torch.rand(3, 4, 6)
SAMPLE = Sample(
    "a", "svdd", 0, (Ranked(0.5, IMAGE, IMAGE.bfloat16(), torch.zeros(0), Winner(1, 2, 3, 4, ((0, 1, 2),))),), 40, 38,
    0, 38, 38, 2,
)  # fmt: skip


class Fake:
    """In the place of a `Child`."""

    def __init__(self, setup: Any, number: int, loop: Any, hear: Callable[..., None]):
        self.setup, self.number, self.hear = setup, number, hear
        self.sent: list[tuple[Any, ...]] = []
        self.over = False

    def send(self, *message: Any) -> None:
        self.sent.append(message)

    def end(self) -> None:
        self.over = True

    def ended(self, seconds: float) -> None:
        pass

    @property
    def ids(self) -> list[str]:
        return [message[1] for message in self.sent if message[0] == "add"]


@pytest.fixture(autouse=True)
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[Fake]:
    made: list[Fake] = []

    def child(*facts: Any) -> Fake:
        made.append(Fake(*facts))
        return made[-1]

    monkeypatch.setattr(fleets, "Child", child)
    monkeypatch.setattr(fleets, "WAITS", (0.0,))
    return made


class Asked:
    """A request of a test, and what it has heard."""

    def __init__(self, fleet: Fleet, **params: Any):
        self.events: list[Event] = []
        self.error: BaseException | None = None
        self.task = asyncio.ensure_future(self.run(fleet, params))

    async def run(self, fleet: Fleet, params: dict[str, Any]) -> None:
        try:
            async for event in fleet.generate("a", **params):
                self.events.append(event)
        except Exception as error:
            self.error = error


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0.001)


async def started(fakes: list[Fake], **options: Any) -> Fleet:
    fleet = Fleet(ServeConfig(**{"engines": 2, **options}))
    starting = asyncio.ensure_future(fleet.start())
    await settle()
    for fake in sorted(fakes, key=lambda fake: fake.number):
        assert not starting.done()
        fake.hear("ready", ("near",), ("6x4",))
    assert await starting == ("6x4",)
    fakes.sort(key=lambda fake: fake.number)
    return fleet


async def ask(fleet: Fleet, **params: Any) -> Asked:
    asked = Asked(fleet, **{"budget": 40, **params})
    await settle()
    return asked


def run(work: Callable[[], Coroutine[Any, Any, None]]) -> None:
    in_time(work)


# ---- who gets what ----


def test_a_request_goes_to_the_engine_with_the_fewest_nfe_to_go(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        one, two = fakes
        await ask(fleet, budget=100)
        await ask(fleet, budget=40)
        await ask(fleet, budget=40)
        assert (one.ids, two.ids) == (["0"], ["1", "2"])
        await ask(fleet, budget=30)  # 100 against 80
        assert two.ids == ["1", "2", "3"]
        one.hear("event", Progress("0", nfe=95, budget=100))
        await ask(fleet, budget=200)
        assert one.ids == ["0", "4"]
        two.hear("event", Finished("1", SAMPLE, Rerun(), 1.0))
        two.hear("event", Failed("2", "model", OptionError("no")))
        await ask(fleet)  # 205 against 30
        assert two.ids == ["1", "2", "3", "5"]

    run(work)


def test_equal_ones_get_as_many_requests(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes, engines=3)
        for _ in range(6):
            await ask(fleet)
        assert [fake.ids for fake in fakes] == [["0", "3"], ["1", "4"], ["2", "5"]]

    run(work)


def test_options_go_as_they_came_and_a_deadline_as_what_is_left(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        await ask(fleet, seed=3, looks=2, priority=4, deadline=10.0)
        ((kind, id, prompt, options),) = fakes[0].sent
        assert (kind, id, prompt) == ("add", "0", "a") and 9 < options.pop("deadline") <= 10
        assert options == {"budget": 40, "seed": 3, "looks": 2, "priority": 4}
        await asyncio.sleep(0.2)
        fakes[0].hear("gone", -9)
        assert fakes[1].sent[0][3]["deadline"] < 9.81

    run(work)


def test_who_leaves_is_aborted(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        asked = await ask(fleet)
        asked.task.cancel()
        await settle()
        assert fakes[0].sent[1:] == [("abort", "0")] and not fleet._open
        fakes[0].hear("event", Progress("0", 4, 40))  # was on its way
        done = await ask(fleet)
        fakes[0].hear("event", Finished("1", SAMPLE, Rerun(), 1.0))
        await settle()
        assert done.task.done() and len(fakes[0].sent) == 3  # nobody is aborted who has ended

    run(work)


def test_what_an_engine_refuses_is_raised(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        asked = await ask(fleet)
        fakes[0].hear("refused", "0", PromptError("no such colour"))
        await settle()
        assert isinstance(asked.error, PromptError) and not fleet._open

    run(work)


def test_it_drains(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        first = await ask(fleet)
        draining = asyncio.ensure_future(fleet.drain(60))
        await settle()
        refused = await ask(fleet)
        assert isinstance(refused.error, OptionError) and not draining.done()
        fakes[0].hear("event", Finished("0", SAMPLE, Rerun(), 1.0))
        await draining
        await settle()
        assert isinstance(first.events[-1], Finished)

    run(work)


def test_what_is_not_done_in_time_is_aborted(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        asked = await ask(fleet)
        await fleet.drain(0.0)
        await settle()
        (last,) = asked.events
        assert isinstance(last, Failed) and last.reason == "aborted"
        assert fakes[0].sent[1:] == [("abort", "0")]
        await fleet.drain(None)

    run(work)


# ---- what dies ----


def test_requests_of_a_dead_engine_begin_anew_on_another(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        asked = await ask(fleet)
        other = await ask(fleet)
        fakes[0].hear("event", Found("0", 0.3, 20))
        await asyncio.sleep(0.3)
        fakes[0].hear("gone", -9)
        await settle()
        assert fakes[1].ids == ["1", "0"] and asked.events == [Found("0", 0.3, 20), Restarted("0", 1)]
        assert other.events == []
        fakes[1].hear("event", Finished("0", SAMPLE, Rerun(), seconds=0.1, waited=0.05))
        await settle()
        last = asked.events[-1]
        assert isinstance(last, Finished) and last.sample is SAMPLE
        assert last.seconds > 0.4 and last.seconds - last.waited == pytest.approx(0.05)
        assert len(fakes) == 3 and fakes[2].number == 0  # a new process
        await ask(fleet)
        assert fakes[1].ids[-1] == "2"  # it is not ready
        fakes[2].hear("ready", ("near",), ("6x4",))
        await ask(fleet)
        assert fakes[2].ids == ["3"]

    run(work)


def test_where_no_engine_is_left_requests_wait_for_one(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes, engines=None, devices=("cpu",))
        running = await ask(fleet)
        fakes[0].hear("died", "KeyError")
        fakes[0].hear("gone", 1)
        waiting, late = await ask(fleet), await ask(fleet, deadline=0.01)
        assert fleet.standing.waiting == 3
        fakes[1].hear("ready", ("near",), ("6x4",))
        await settle()
        assert fakes[1].ids == ["0", "1"] and running.events == [Restarted("0", 1)] and not waiting.events
        (last,) = late.events
        assert isinstance(last, Failed) and isinstance(last.error, DeadlineError)

    run(work)


def test_a_request_of_which_engines_die_ends_alone(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes, engines=None, devices=("cpu",))
        fatal = await ask(fleet)
        for times in range(3):
            assert len(fatal.events) == times
            fakes[-1].hear("gone", -11)
            await settle()
            fakes[-1].hear("ready", ("near",), ("6x4",))
            await settle()
        last = fatal.events[-1]
        assert isinstance(last, Failed) and last.reason == "engine" and "3 engines died" in str(last.error)
        assert "exit code -11" in str(last.error) and fleet.death is None
        await ask(fleet)
        fakes[-1].hear("event", Finished("1", SAMPLE, Rerun(), 1.0))
        assert fleet.seats[0].deaths == 0  # it can do its work

    run(work)


def test_counts_never_fall(fakes: list[Fake]) -> None:
    async def work() -> None:
        fleet = await started(fakes)
        fakes[0].hear("standing", replace(NOTHING, rows=50, running=2, reward_seconds=0.5))
        fakes[1].hear("standing", replace(NOTHING, rows=7, running=1))
        assert (fleet.standing.rows, fleet.standing.running) == (57, 3)
        fakes[0].hear("gone", -9)
        assert (fleet.standing.rows, fleet.standing.running, fleet.standing.reward_seconds) == (57, 1, 0.5)

    run(work)


def test_an_engine_that_always_dies_ends_the_service(fakes: list[Fake]) -> None:
    """/health says so, and whoever is there hears one clear 500."""

    async def work() -> None:
        server = Server(engines=2)
        server.serving.make = None
        async with server.app.router.lifespan_context(server.app):
            await settle()
            for fake in list(fakes):
                fake.hear("ready", ("near",), ("6x4",))
            await settle()
            assert server.serving.phase == "ready"
            fakes.sort(key=lambda fake: fake.number)
            other = fakes[1]
            bodies = [{"prompt": "a", "budget": 20}, {"prompt": "a", "budget": 20, "stream": True}]
            for death in range(MOST_DEATHS):
                assert server.serving.death is None
                fakes[-1 if death else 0].hear("gone", -9)
                await settle()
                if death == MOST_DEATHS - 2:
                    tasks = [asyncio.ensure_future(server.ask(body)) for body in bodies]
                    await settle()
            assert other.over and len(fakes) == 1 + MOST_DEATHS
            assert "engine 0 died" in str(server.serving.death)
            for answer in await asyncio.gather(*tasks):
                assert answer.status == 500 and answer.json["error"]["code"] == "engine_dead"
            assert (await server.ask(bodies[0])).status == 500
            other.hear("gone", -9)
            other.hear("ready", ("near",), ("6x4",))  # nobody listens
            await settle()
            assert len(fakes) == 1 + MOST_DEATHS
            assert 'engine_up{engine="1"} 0.0' in server.serving.metrics.text().decode()

    run(work)


def test_whoever_fails_as_it_starts_ends_the_start(fakes: list[Fake], monkeypatch: pytest.MonkeyPatch) -> None:
    async def work() -> None:
        for messages, words in (
            ([("failed", OptionError("no such model")), ("gone", 1)], "no such model"),
            ([("gone", -9)], "exit code -9.*as it started"),
        ):
            fleet = Fleet(ServeConfig(engines=2))
            starting = asyncio.ensure_future(fleet.start())
            await settle()
            fakes[-1].hear("ready", ("near",), ("6x4",))
            for message in messages:
                fakes[-2].hear(*message)
            with pytest.raises((OptionError, EngineDeadError), match=words):
                await starting
            assert fakes[-1].over and fleet.death is not None
            await settle()
        assert len(fakes) == 4
        monkeypatch.setattr(fleets, "START_SECONDS", 0.01)
        with pytest.raises(OptionError, match=r"engine 0, 1 did not start within 0.01 s"):
            await Fleet(ServeConfig(engines=2)).start()

    run(work)


# ---- what goes through the pipe ----


def test_events_come_out_as_they_went_in() -> None:
    candidate = Candidate(0, 1, 2, 3, 4, 0.5, None, False, "best", 20)
    for event in (
        Progress("1", 4, 40, (candidate,)), Found("1", 0.5, 20), Partial("1", IMAGE, 20),
        Finished("1", SAMPLE, Rerun(cuts=((0, 1, 2),)), 1.5, 4, 0.5),
    ):  # fmt: skip
        found = unpacked(packed(event))
        assert repr(found) == repr(event) and type(found) is type(event)
    latent = found.sample.latent
    assert (
        latent.dtype == torch.bfloat16 and torch.equal(latent, SAMPLE.latent) and found.sample.top[0].x_t.numel() == 0
    )
    assert torch.equal(found.sample.image, IMAGE) and found.sample.image.is_contiguous()
    strided = IMAGE.permute(2, 0, 1)
    assert torch.equal(unpacked(packed(strided)), strided)


def test_errors_come_out_as_what_both_ends_know() -> None:
    failed = unpacked(packed(Failed("1", "model", OperandError("of no use"))))
    assert type(failed.error).__name__ == "FlowfastError" and str(failed.error) == "of no use"
    assert type(unpacked(packed(PromptError("no")))) is PromptError
    assert unpacked(packed(DeadlineError("late", 2.5))).seconds == 2.5


# ---- what is asked for ----


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"engines": 0}, "engines"),
        ({"engines": 65}, "engines"),
        ({"engines": 2, "devices": "cuda:0"}, "2 engines on 1 devices"),
        ({"devices": "gpu"}, "expected devices such as"),
        ({"devices": "cuda,cuda:0"}, "stands twice"),
        ({"devices": "cuda:0", "model_options": {"device": "cpu"}}, "give one of them"),
        ({"threads": 0}, "threads"),
    ],
)
def test_what_does_not_go_together(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ServeConfig(**options)


def test_how_many_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(8)))
    for options, count, apart, threads in (
        ({}, 1, False, None),
        ({"engines": 1}, 1, False, None),
        ({"engines": 3}, 3, True, 2),
        ({"engines": 20}, 20, True, 1),
        ({"devices": "cuda:1"}, 1, True, None),
        ({"devices": "cuda:0, cuda:1"}, 2, True, 4),
        ({"devices": ["cpu", "cpu"], "threads": 3}, 2, True, 3),
    ):
        config = ServeConfig(**options)  # type: ignore[arg-type]
        assert (config.count, config.apart, config.torch_threads) == (count, apart, threads)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ServeConfig(engines=3).torch_threads is None
    assert Serving(ServeConfig(engines=3, slots=4, queue=5)).gate.most == 17


def test_which_device_a_process_sees() -> None:
    assert [visible(name, None) for name in ("cpu", "cuda", "cuda:0", "cuda:3")] == ["", "0", "0", "3"]
    assert [visible(name, "5,GPU-a") for name in ("cpu", "cuda:0", "cuda:1")] == ["", "5", "GPU-a"]
    for before in ("5", ""):
        with pytest.raises(OptionError, match="cuda:1 is none of the"):
            visible("cuda:1", before)
