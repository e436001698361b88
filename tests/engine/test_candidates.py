"""Candidates that one request asks for: the same that a search alone tells, and none for its neighbours; what a
regrouping ends is told as ended."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch
from fake_device import DEVICE, FakeDevice

import flowfast
from flowfast.engine import outputs
from flowfast.engine.engine import Engine
from flowfast.engine.snapshot import entry_of, request_of
from flowfast.types import Candidate
from tests.on_device import FlowOnDevice, RewardOnDevice
from tests.toys import METHODS, GaussianFlow, NearTarget

SEARCH: dict[str, Any] = {"budget": 60, "steps": 6, "score_all": True}


def alone(method: str) -> tuple[list[Candidate], flowfast.Sample]:
    told: list[Candidate] = []
    result = flowfast.search(
        GaussianFlow(), ["a"], reward=NearTarget(), micro_batch=4, method=method, on_round=told.extend, **SEARCH
    )
    return told, result.samples[0]


def told_of(engine: Engine, method: str) -> tuple[dict[str, list[Candidate]], dict[str, flowfast.Sample]]:
    """By id, of three requests: the second one asks, and comes while the first one runs."""
    seen: dict[str, list[Candidate]] = {"before": [], "mine": [], "after": []}
    samples = {}
    engine.add_request("bb", method=method, id="before", **SEARCH)
    events = engine.step() + engine.step()
    engine.add_request("a", method=method, id="mine", candidates=True, **SEARCH)
    events += engine.step()
    engine.add_request("ccc", method=method, id="after", **SEARCH)
    for event in [*events, *engine.stream()]:
        if isinstance(event, flowfast.Progress):
            seen[event.id] += event.candidates
        elif isinstance(event, flowfast.Finished):
            samples[event.id] = event.sample
    return seen, samples


@pytest.mark.parametrize("method", METHODS)
def test_who_asks_is_told_and_nobody_else(method: str) -> None:
    expected, sample = alone(method)
    engine = Engine(GaussianFlow(), {"near": NearTarget()}, slots=2, micro_batch=4, max_budget=60)
    seen, samples = told_of(engine, method)
    assert [each._replace(prompt=0) for each in seen["mine"]] == [each._replace(prompt=0) for each in expected]
    assert len(seen["mine"]) == sample.nfe and not seen["before"] and not seen["after"]
    assert torch.equal(samples["mine"].image, sample.image) and samples["mine"].winner == sample.winner


def test_a_device_tells_the_same() -> None:
    expected, _ = alone("smc")
    with FakeDevice():
        engine = Engine(
            FlowOnDevice().to(DEVICE), {"near": RewardOnDevice().to(DEVICE)}, slots=2, micro_batch=4, max_budget=60
        )
        seen, _ = told_of(engine, "smc")
    assert [each._replace(prompt=0) for each in seen["mine"]] == [each._replace(prompt=0) for each in expected]
    assert not seen["before"] and not seen["after"]


def regrouped(told: list[Candidate]) -> dict[int, list[Candidate]]:
    """The candidates of transitions after which chains ended, by transition."""
    found: dict[int, list[Candidate]] = {}
    for each in told:
        found.setdefault(each.transition, []).append(each)
    return {at: those for at, those in found.items() if any(each.status == "ended" for each in those)}


@pytest.mark.parametrize("method", METHODS)
def test_what_ended_is_on_no_path_and_what_went_on_is_as_many(method: str) -> None:
    told: list[Candidate] = []
    result = flowfast.search(
        GaussianFlow(), ["a", "bb", "ccc"], reward=NearTarget(), method=method, top_k=8, on_round=told.extend, **SEARCH
    )
    for prompt, sample in enumerate(result.samples):
        of_prompt = [each for each in told if each.prompt == prompt]
        by_address = {(each.chain, each.transition, each.candidate): each for each in of_prompt}
        for ranked in sample.top:
            steps = [by_address[step] for step in ranked.winner.path]
            assert all(each.status != "ended" for each in steps), "a path goes on from each of its steps"
        ended = regrouped(of_prompt)
        assert bool(ended) == (method in ("prune", "smc", "code", "sop"))
        if method == "prune":
            for at, those in ended.items():
                kept = [each.reward or 0.0 for each in those if each.status != "ended"]
                assert len(kept) == sum(each.transition == at + 1 for each in of_prompt)
                assert min(kept) >= max(each.reward or 0.0 for each in those if each.status == "ended")


def test_origins_that_forget_who_moved_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(reports: outputs.Reports) -> torch.Tensor:  # the mutant: whoever lives went on from itself
        state = reports.engine.state
        return torch.where(state.alive, torch.arange(len(state.alive)) % reports.engine.chains, -1)

    monkeypatch.setattr(outputs.Reports, "_origins", forgetful)
    with pytest.raises(AssertionError):
        test_what_ended_is_on_no_path_and_what_went_on_is_as_many("prune")


def test_an_async_engine_tells_the_task_that_asks() -> None:
    async def work(candidates: bool) -> int:
        async with flowfast.AsyncEngine(GaussianFlow(), NearTarget(), micro_batch=4, max_budget=60) as engine:
            events = [event async for event in engine.generate("a", method="svdd", candidates=candidates, **SEARCH)]
        return sum(len(event.candidates) for event in events if isinstance(event, flowfast.Progress))

    assert asyncio.run(work(False)) == 0 < asyncio.run(work(True)) <= 60


def test_the_wish_lasts_in_a_journal() -> None:
    engine = Engine(GaussianFlow(), {"near": NearTarget()}, max_budget=60)
    for wish in (True, False):
        id = engine.add_request("a", candidates=wish, method="svdd", **SEARCH)
        entry = entry_of(engine._jobs[id].request, 0)
        assert request_of(entry).candidates is wish
        assert not request_of({name: entry[name] for name in entry if name != "candidates"}).candidates
