"""A model that changes under a long-lived engine."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

import flowfast
from flowfast.errors import OptionError

ASKED: dict[str, Any] = {"method": "svdd", "budget": 40, "seed": 0}
SIZES: dict[str, Any] = {"slots": 2, "micro_batch": 4}


def change(flow: Any) -> None:
    with torch.no_grad():
        next(flow.parameters()).mul_(0.5)


def image(events: list[flowfast.Event]) -> torch.Tensor:
    (finished,) = [event for event in events if isinstance(event, flowfast.Finished)]
    return finished.sample.image


def test_an_engine_takes_a_changed_model_over_and_requests_again() -> None:
    flow: Any = flowfast.load("scenes")
    engine = flowfast.Engine(flow, reward="scenes", **SIZES)
    engine.add_request("two red circles", **ASKED)
    with pytest.raises(OptionError, match="1 requests still run"):
        engine.reload()
    before = image(engine.drain())
    change(flow)
    engine.reload()
    engine.add_request("two red circles", **ASKED)
    after = image(list(engine.stream()))
    fresh = flowfast.search(flow, ["two red circles"], reward="scenes", micro_batch=4, **ASKED)
    assert not torch.equal(before, after)
    assert torch.equal(after, fresh.samples[0].image)


def test_an_engine_on_a_thread_does_so_too() -> None:
    async def run() -> tuple[list[flowfast.Event], torch.Tensor]:
        flow: Any = flowfast.load("scenes")
        async with flowfast.AsyncEngine(flow, reward="scenes", **SIZES) as engine:
            await engine.drain()
            change(flow)
            with pytest.raises(OptionError, match="drained"):
                await anext(engine.generate("two red circles", **ASKED))
            await engine.reload()
            events = [event async for event in engine.generate("two red circles", **ASKED)]
            with pytest.raises(OptionError, match="under the engine"):
                change(flow)
                await anext(engine.generate("two red circles", **ASKED))
            await engine.drain()
            await engine.reload()
            again = [event async for event in engine.generate("two red circles", **ASKED)]
        return events, image(again)

    events, again = asyncio.run(asyncio.wait_for(run(), 60))
    assert not torch.equal(image(events), again)
