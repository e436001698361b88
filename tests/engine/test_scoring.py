"""Whose fault it is where a reward fails: only the guilty request ends, and no neighbour's bits change."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.engine import runner
from flowfast.errors import RewardError
from flowfast.rewards import CallableReward
from tests.engine.test_call import near
from tests.toys import GaussianFlow, NearTarget

PROMPTS = ["a", "bb", "ccc", "dddd"]
METHODS = ["rbf", "svdd", "smc", "bon", "code"]


class Refuses(NearTarget):
    """Cannot score the images of a prompt of two letters."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if bool((cond["target"] == NearTarget().encode(["bb"])["target"]).any()):
            raise RewardError("no such class")
        return super().forward(images, t, cond)


def refuses(images: Tensor, prompts: list[str]) -> Tensor:
    if "bb" in prompts:
        raise ValueError("no such class")
    return near(images, prompts)


def run(reward: Any, prompts: list[str], method: str, **options: Any) -> dict[str, Any]:
    """The last event of each prompt."""
    with flowfast.Engine(GaussianFlow(), reward, micro_batch=4, slots=4, **options) as engine:
        for prompt in prompts:
            engine.add_request(prompt, id=prompt, method=method, budget=60, steps=6)
        return {event.id: event for event in engine.stream() if isinstance(event, flowfast.Finished | flowfast.Failed)}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "reward",
    [Refuses(), refuses, CallableReward(refuses, independent=True)],
    ids=["device", "host", "independent rows"],
)
def test_only_the_guilty_end(reward: Any, method: str) -> None:
    found = run(reward, PROMPTS, method)
    failed = found.pop("bb")
    assert isinstance(failed, flowfast.Failed) and failed.reason == "reward" and "no such class" in str(failed.error)
    for prompt, event in found.items():
        alone = run(reward, [prompt], method)[prompt]
        assert torch.equal(event.sample.latent, alone.sample.latent)
        assert (event.sample.winner, event.sample.nfe) == (alone.sample.winner, alone.sample.nfe)


def test_a_reward_that_fails_for_all_at_once_would_end_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nobody asks again a request at a time."""

    def blames_all(engine: Any, scorer: Any, images: Tensor) -> Any:
        scores = torch.full((len(images),), -torch.inf)
        return scores, dict.fromkeys(range(engine.slots), RewardError("no such class"))

    monkeypatch.setattr(runner, "score_one_by_one", blames_all)
    assert all(isinstance(event, flowfast.Failed) for event in run(Refuses(), PROMPTS, "svdd").values())


@pytest.mark.parametrize(("independent", "most"), [(False, 1), (True, 4)])
def test_a_call_has_the_images_of_one_request_unless_each_is_scored_by_itself(independent: bool, most: int) -> None:
    seen: list[int] = []

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(len(set(prompts)))
        return near(images, prompts)

    run(CallableReward(score, independent=independent), PROMPTS, "svdd", overlap=False)
    assert max(seen) == most
