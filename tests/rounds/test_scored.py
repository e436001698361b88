"""Only what a decision reads is decoded and scored, and nothing else changes by it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError
from flowfast.methods.plan import Plan
from flowfast.types import Candidate, SearchResult
from tests.toys import METHODS, GaussianFlow, NearTarget, build

PROMPTS = ["a", "bb", "ccc"]
OPTIONS: dict[str, Any] = {"budget": 60, "steps": 6, "guidance": 1.0, "slots": 2, "micro_batch": 4}
EARLY = {"rbf", "rbf-official"}  # take better children at once


class Counting(GaussianFlow):
    """Counts the rows that are decoded."""

    decoded = 0

    def decode(self, x0: Tensor) -> Tensor:
        self.decoded += len(x0)
        return super().decode(x0)


def search(method: str, host: bool, **options: Any) -> tuple[SearchResult, list[Candidate], Counting]:
    flow, seen, device = Counting(), list[Candidate](), NearTarget()

    def on_host(images: Tensor, prompts: list[str]) -> Tensor:
        return device(images, torch.zeros(len(prompts)), device.encode(list(prompts)))

    reward = on_host if host else device
    result = flowfast.search(
        flow, PROMPTS, reward=reward, method=method, on_round=seen.extend, **{**OPTIONS, **options}
    )
    return result, seen, flow


@pytest.mark.parametrize("host", [False, True], ids=["device", "host"])
@pytest.mark.parametrize("method", METHODS)
def test_scoring_everything_finds_the_same(method: str, host: bool) -> None:
    (sparse, few, some), (whole, many, all_of_them) = (search(method, host, score_all=each) for each in (False, True))
    for one, other in zip(sparse.samples, whole.samples, strict=True):
        assert (one.winner, one.reward, one.nfe, one.unspent) == (other.winner, other.reward, other.nfe, other.unspent)
        assert torch.equal(one.latent, other.latent) and torch.equal(one.image, other.image)
        assert other.reward_calls == other.evaluations
    assert [c._replace(reward=None) for c in few] == [c._replace(reward=None) for c in many]
    assert all(c.reward in (None, d.reward) for c, d in zip(few, many, strict=True))
    assert sum(c.reward is not None for c in few) == sum(sample.reward_calls for sample in sparse.samples)
    assert (some.decoded < all_of_them.decoded) == (method not in EARLY)


@pytest.mark.parametrize("method", sorted(set(METHODS) - EARLY))
def test_as_many_as_planned_are_scored(method: str) -> None:
    bench = build(method, **{**OPTIONS, "budget": 60})
    result, seen, _ = search(method, False)
    planned = sum(bench.plan.forecast().scored)
    assert [sample.reward_calls for sample in result.samples] == [planned] * len(PROMPTS)
    read = bench.plan.scored
    assert all((candidate.reward is not None) == read[candidate.transition] for candidate in seen)
    assert read[-1] and not all(read)


def test_a_plain_sample_is_decoded_once_on_its_way_and_once_at_its_end() -> None:
    """One micro-batch for the round of its end; the second is what is handed out."""
    result, _, flow = search("ode", False, slots=1)
    assert flow.decoded == len(PROMPTS) * (OPTIONS["micro_batch"] + 1)
    assert [sample.reward_calls for sample in result.samples] == [1, 1, 1]


def test_best_of_n_on_scenes_scores_its_samples_and_nothing_else() -> None:
    flow = flowfast.load("scenes")
    result = flowfast.search(flow, ["two red circles"], reward="scenes", method="bon", budget=100, seed=0)
    assert result.samples[0].nfe == 100 and result.samples[0].reward_calls == 5


def without(what: str) -> Callable[[Plan, list[bool]], list[bool]]:
    """Plan.read that forgets one reason to score."""
    right = Plan.read

    def wrong(self: Plan, finished: list[bool]) -> list[bool]:
        if what == "regroup":
            return right(replace(self, regroup=[]), finished)
        if what == "compete":
            return right(replace(self, quota=[[min(1, q) for q in of_chain] for of_chain in self.quota]), finished)
        return right(self, [False] * len(finished))

    return wrong


@pytest.mark.parametrize(("what", "method"), [("regroup", "smc"), ("regroup", "code"), ("compete", "svdd")])
def test_a_score_that_is_read_and_not_made_is_seen(what: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = [sample.winner for sample in search(method, False)[0].samples]
    monkeypatch.setattr(Plan, "read", without(what))
    assert [sample.winner for sample in search(method, False)[0].samples] != right


def test_a_sample_that_is_never_scored_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Plan, "read", without("finished"))
    with pytest.raises(ModelError, match="no finished sample"):
        search("bon", False)


def test_early_acceptance_reads_every_score() -> None:
    result, seen, _ = search("rbf", False)
    assert all(candidate.reward is not None and math.isfinite(candidate.reward) for candidate in seen)
    assert all(sample.reward_calls == sample.evaluations for sample in result.samples)
