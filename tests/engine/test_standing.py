"""What an engine shows of a request on the way: a picture that it has seen, and no bit of the search changes."""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.engine.engine import Engine
from flowfast.engine.standing import best_so_far, standing_of
from flowfast.errors import EngineDeadError
from tests.toys import METHODS, GaussianFlow, NearTarget

SEARCH: dict[str, Any] = {"budget": 60, "steps": 6}


class Seen(GaussianFlow):
    """Keeps what it decodes."""

    def __init__(self) -> None:
        super().__init__((3, 2, 2))
        self.pictures: list[Tensor] = []
        self.rows = 0

    def decode(self, x0: Tensor) -> Tensor:
        self.pictures += list(x0.clone())
        self.rows += len(x0)
        return x0


def near(image: Tensor, others: list[Tensor]) -> float:
    return min(float((image - other).abs().max()) for other in others)


@pytest.mark.parametrize("method", METHODS)
def test_it_is_a_picture_of_the_search_and_costs_one_row(method: str) -> None:
    """With every child scored, each posterior mean has been decoded before it is looked at."""
    asked = {**SEARCH, "method": method, "score_all": True}
    alone = flowfast.search(GaussianFlow((3, 2, 2)), ["a"], reward=NearTarget(), micro_batch=4, **asked).samples[0]
    flow = Seen()
    engine = Engine(flow, {"near": NearTarget()}, slots=2, micro_batch=4, max_budget=60)
    engine.add_request("bb", **asked, id="other")
    engine.add_request("a", **asked, id="mine")
    assert best_so_far(engine, "mine") is None and best_so_far(engine, "nobody") is None
    looked, events = 0, list[Any]()
    while engine.busy:
        events += engine.step()
        before, rows = list(flow.pictures), flow.rows
        image = best_so_far(engine, "mine")
        if image is not None:
            looked += 1
            assert image.shape == (3, 2, 2) and flow.rows == rows + 1
            assert near(image, before) < 1e-5
    (sample,) = [event.sample for event in events if isinstance(event, flowfast.Finished) and event.id == "mine"]
    assert looked >= 3
    assert torch.equal(sample.image, alone.image) and sample.nfe == alone.nfe
    assert best_so_far(engine, "mine") is None


@pytest.mark.parametrize("method", ["bon", "smc"])
def test_it_is_that_of_the_chain_with_the_best_reward(method: str) -> None:
    reward = NearTarget()
    engine = Engine(Seen(), {"near": reward}, slots=1, micro_batch=4, max_budget=60)
    engine.add_request("a", method=method, **SEARCH, score_all=True, id="mine")
    looked = 0
    while engine.busy:
        engine.step()
        image = best_so_far(engine, "mine")
        if image is not None:
            rewards = engine.core.scheduler.batches[0].runner.engine.state.reward  # type: ignore[attr-defined]
            assert len(rewards) > 3
            found = reward(image[None], torch.zeros(1), reward.encode(["a"]))
            torch.testing.assert_close(found[0], rewards.max())
            looked += 1
    assert looked > 2


def test_a_finished_sample_comes_before_posterior_means() -> None:
    flow = Seen()
    flow.t_finish = 0.6  # so that several transitions end in one
    engine = Engine(flow, {"near": NearTarget()}, slots=1, micro_batch=4, max_budget=60)
    engine.add_request("a", method="svdd", **SEARCH, id="mine")
    last, sample = None, None
    while engine.busy:
        for event in engine.step():
            sample = event.sample if isinstance(event, flowfast.Finished) else sample
        image = best_so_far(engine, "mine")
        state = next(iter(engine.core.scheduler.batches)).runner.engine.state  # type: ignore[attr-defined]
        if image is not None and float(state.top_reward[0, 0]) > -torch.inf:
            assert torch.equal(image.flatten(), state.top_x0[0])
            last = image
    assert last is not None and sample is not None


def test_a_decoder_that_fails_shows_nothing() -> None:
    class Broken(Seen):
        broken = False

        def decode(self, x0: Tensor) -> Tensor:
            return x0 * torch.nan if self.broken else super().decode(x0)

    flow = Broken()
    engine = Engine(flow, {"near": NearTarget()}, slots=1, micro_batch=4, max_budget=60)
    engine.add_request("a", method="svdd", **SEARCH, id="mine")
    engine.step()
    flow.broken = True
    assert best_so_far(engine, "mine") is None
    flow.broken = False
    assert best_so_far(engine, "mine") is not None


def test_what_it_counts() -> None:
    engine = Engine(GaussianFlow(), {"near": NearTarget()}, slots=2, micro_batch=4, max_budget=60)
    for seed in range(3):
        engine.add_request("a", method="svdd", seed=seed, **SEARCH)
    now = standing_of(engine)
    assert (now.running, now.waiting, now.rows, now.rows_used) == (0, 3, 0, 0)
    engine.step()
    now = standing_of(engine)
    assert (now.running, now.waiting) == (2, 1) and now.rows > 0
    done = [event for event in engine.stream() if isinstance(event, flowfast.Finished)]
    now = standing_of(engine)
    assert (now.running, now.waiting) == (0, 0) and now.rows >= now.rows_used == sum(event.sample.nfe for event in done)
    assert [event.micro_batch for event in done] == [4] * 3
    assert all(0 <= event.waited < event.seconds for event in done)
    assert max(event.waited for event in done) > min(event.seconds for event in done) / 2  # the third one


@pytest.mark.parametrize("method", METHODS)
def test_each_row_of_the_model_was_needed_or_padding(method: str) -> None:
    """Of three requests, one taken back, as the model itself counts them; what is counted never falls."""
    flow = GaussianFlow()
    engine = Engine(flow, {"near": NearTarget()}, slots=2, micro_batch=4, max_budget=60)
    for id in "abc":
        engine.add_request(id, method=method, id=id, **SEARCH)
    seen, spent = [standing_of(engine)], 0
    while engine.busy:
        told = engine.step()
        spent += sum(event.sample.nfe for event in told if isinstance(event, flowfast.Finished))
        seen.append(standing_of(engine))
        if len(seen) == 3:
            engine.abort("b")
    for before, now in itertools.pairwise(seen):
        assert now.rows_used >= before.rows_used and now.rows_padded >= before.rows_padded
    last = seen[-1]
    assert last.rows == int(flow.seen) == last.rows_used + last.rows_padded
    assert spent < last.rows_used < spent + 60 and last.splits == 0  # and what the one had spent


def test_each_time_that_memory_runs_out_is_counted() -> None:
    class Hungry(GaussianFlow):
        most = 2

        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if len(x_t) > self.most:
                raise torch.OutOfMemoryError("no room")
            return super().velocity(x_t, t, cond)

    flow = Hungry()
    engine = Engine(flow, {"near": NearTarget()}, slots=2, micro_batch=8, max_budget=60)
    engine.add_request("a", method="svdd", **SEARCH)
    list(engine.stream())
    now = standing_of(engine)
    assert now.splits == 2 and now.rows == int(flow.seen) == now.rows_used + now.rows_padded
    flow.most = 1
    engine.add_request("a", method="svdd", **SEARCH)
    list(engine.stream())
    assert standing_of(engine).splits == 3


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("method", ["svdd", "rbf"])
def test_looks_come_at_the_same_rounds_whatever_else_runs(method: str, count: int) -> None:
    async def one(engine: flowfast.AsyncEngine, prompt: str = "a") -> list[Any]:
        return [event async for event in engine.generate(prompt, looks=count, method=method, **SEARCH)]

    async def work() -> None:
        options: dict[str, Any] = {"slots": 4, "micro_batch": 4, "max_budget": 60}
        async with flowfast.AsyncEngine(GaussianFlow((3, 2, 2)), {"near": NearTarget()}, **options) as engine:
            alone = await one(engine)
            among, *_ = await asyncio.gather(one(engine), *(one(engine, "b" * k) for k in range(2, 9)))
        looks, again = ([event for event in of if isinstance(event, flowfast.Partial)] for of in (alone, among))
        assert len(looks) == count
        assert [look.nfe for look in looks] == [look.nfe for look in again]
        assert all(torch.equal(look.image, other.image) for look, other in zip(looks, again, strict=True))
        parts = [60 * (k + 1) / (count + 1) for k in range(count)]
        assert all(part <= look.nfe < part + 60 / (count + 1) for part, look in zip(parts, looks, strict=True))
        assert torch.equal(alone[-1].sample.image, among[-1].sample.image)

    asyncio.run(work())


def test_over_the_engines_thread() -> None:
    async def work() -> None:
        async with flowfast.AsyncEngine(
            GaussianFlow((3, 2, 2)), {"near": NearTarget(), "far": NearTarget()}, slots=1, micro_batch=4, max_budget=60
        ) as engine:
            assert engine.rewards == ("near", "far") and engine.death is None
            looks = [
                await engine.peek(event.id)
                async for event in engine.generate("a", method="svdd", **SEARCH)
                if isinstance(event, flowfast.Progress)
            ]
            assert engine.standing.running == 0
        assert isinstance(engine.death, EngineDeadError)
        with pytest.raises(EngineDeadError):
            await engine.peek("mine")
        assert any(look is not None for look in looks)

    asyncio.run(work())
