"""A request among hundreds of others gets the bits that it gets alone, and no round waits for the device, whoever comes
and goes."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from fake_device import DEVICE, FakeDevice
from torch import Tensor

import flowfast
from flowfast.engine.engine import Engine
from flowfast.errors import RewardError
from flowfast.types import Sample
from tests.models.tiny.flux import CASES
from tests.on_device import FlowOnDevice, RewardOnDevice
from tests.toys import METHODS, GaussianFlow, NearTarget

CYCLE = ["two red circles", "one blue square", "three green triangles", "one red circle"]
FAILS = "three blue squares"
"""The host's reward cannot score it."""


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    if FAILS in prompts:
        raise ValueError("no such shade")
    return images.flatten(1).mean(1) * len(prompts[0])


def crowded(images: Tensor, prompts: list[str]) -> Tensor:
    """What it says of an image hangs on those that came with it."""
    shade = bright(images, prompts)
    return -(shade - shade.mean()).abs()


class Setting:
    """A model, and what its requests ask for."""

    def __init__(self, flow: Any, device_reward: Any, least: dict[str, int], others: int, **params: Any):
        self.flow, self.device_reward, self.least, self.others, self.params = flow, device_reward, least, others, params

    def engine(self, host: Any = bright, **options: Any) -> Engine:
        options = {"slots": 3, "micro_batch": 4, "max_budget": 70, **options}
        return Engine(self.flow, {"device": self.device_reward, "host": host}, **options)

    def params_of(self, method: str, more: int = 0) -> dict[str, Any]:
        return {**self.params, "method": method, "budget": self.least.get(method, self.least["*"]) + more}

    def watched(self, host_only: bool = False) -> list[dict[str, Any]]:
        """A request of each method with each reward."""
        rewards = ("host",) if host_only else ("device", "host")
        return [
            {
                "id": f"{method} {reward}",
                "prompt": CYCLE[n % 4],
                "reward": reward,
                "seed": n,
                **self.params_of(method, 4),
            }
            for n, method in enumerate(METHODS)
            for reward in rewards
        ]

    def other(self, number: int, rng: random.Random) -> dict[str, Any]:
        method, reward = rng.choice(METHODS), rng.choice(("device", "host"))
        prompt = FAILS if reward == "host" and rng.random() < 0.2 else rng.choice(CYCLE)
        params = self.params_of(method, rng.choice((0, 0, 0, 5)))
        return {"id": f"other {number}", "prompt": prompt, "reward": reward, "seed": number, **params}


def toy() -> Setting:
    return Setting(GaussianFlow(), NearTarget(), {"*": 12, "sop": 30, "smc": 16, "code": 16}, 300, steps=3)


def guided() -> Setting:
    """Some transitions take two passes, others one."""
    least = {"*": 24, "sop": 60, "smc": 32, "code": 32}
    return Setting(GaussianFlow(), NearTarget(), least, 100, steps=4, guidance="3@0.3:0.985")


def scenes() -> Setting:
    least = {"*": 8, "sop": 21, "smc": 16, "code": 16, "rbf-official": 3}
    return Setting("scenes", "scenes", least, 200, steps=2, guidance=1.0)


def flux() -> Setting:
    case = CASES["flux-schnell"]
    flow = flowfast.from_diffusers(case.build(), **case.size, **case.options)
    return Setting(flow, "sharpness", {"*": 5, "sop": 20, "smc": 10, "code": 10}, 100, steps=2, guidance=1.0)


def alone(setting: Setting, **options: Any) -> dict[str, Sample]:
    found = {}
    for request in setting.watched(host_only="host" in options):
        engine = setting.engine(**options)
        engine.add_request(**request)
        *_, last = engine.stream()
        found[last.id] = last.sample
        engine.close()
    return found


def among_others(setting: Setting, seed: int, by_request: bool = True, **options: Any) -> dict[str, Any]:
    """The last events of all: a few requests come with each step, some are aborted on the way."""
    rng, last, engine = random.Random(seed), dict[str, Any](), setting.engine(**options)
    engine.loaded.by_request = by_request
    watched = setting.watched(host_only="host" in options)
    queue = [*watched, *(setting.other(number, rng) for number in range(setting.others))]
    rng.shuffle(queue)
    while queue or engine.busy:
        for _ in range(min(len(queue), rng.choice((0, 1, 2, 6)))):
            engine.add_request(**queue.pop())
        if rng.random() < 0.1:
            engine.abort(f"other {rng.randrange(setting.others)}")
        for event in engine.step():
            if isinstance(event, flowfast.Finished | flowfast.Failed):
                assert event.id not in last
                last[event.id] = event
    engine.close()
    return last


def assert_same(one: Sample, other: Sample) -> None:
    for name in ("nfe", "winner", "reward", "reward_calls", "nfe_speculative", "unspent"):
        assert getattr(one, name) == getattr(other, name), name
    for name in ("latent", "image"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert torch.equal(one.top[0].x_t, other.top[0].x_t)


@pytest.mark.parametrize("setting", [toy, guided, scenes, flux], ids=lambda setting: setting.__name__)
def test_a_request_among_others_has_the_bits_that_it_has_alone(setting: Any) -> None:
    here = setting()
    expected, last = alone(here), among_others(here, seed=1)
    assert len(expected) == 2 * len(METHODS) and len(last) == len(expected) + here.others
    for id, sample in expected.items():
        assert_same(last[id].sample, sample)
    reasons = [event.reason for event in last.values() if isinstance(event, flowfast.Failed)]
    assert reasons.count("reward") > 5 and reasons.count("aborted") > 2 and set(reasons) == {"reward", "aborted"}


def test_a_reward_that_looks_at_its_neighbours_sees_its_own_request_only() -> None:
    here = toy()
    expected, last = alone(here, host=crowded), among_others(here, seed=2, host=crowded)
    for id, sample in expected.items():
        assert_same(last[id].sample, sample)


def test_a_call_of_the_reward_for_many_requests_would_show() -> None:
    """The mutant. It also fails whoever shares a call with one that fails."""
    here = toy()
    expected, last = alone(here, host=crowded), among_others(here, seed=2, by_request=False, host=crowded)
    differ = [id for id, sample in expected.items() if not same_bits(last[id], sample)]
    assert len(differ) > len(METHODS) / 2


def same_bits(event: Any, sample: Sample) -> bool:
    if isinstance(event, flowfast.Failed):
        return False
    return event.sample.reward == sample.reward and torch.equal(event.sample.latent, sample.latent)


# ---- no round waits ----


class Item(RewardOnDevice):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return super().forward(images, t, cond) / images.abs().max().item()


def waits(method: str, reward: str, device_reward: Any) -> Iterator[int]:
    """Of each step that makes no batch, after the first request, while others join and leave."""
    rng = random.Random(0)
    with FakeDevice() as device:
        rewards = {"device": device_reward.to(DEVICE), "host": bright}
        engine = Engine(FlowOnDevice().to(DEVICE), rewards, slots=2, micro_batch=4, max_budget=60)
        engine.add_request("a", method=method, budget=40, steps=6, reward=reward)
        list(engine.stream())
        budgets = [rng.choice((40, 50, 60)) for _ in range(6)]
        while budgets or engine.busy:
            if budgets and rng.random() < 0.3:
                id = engine.add_request("bb", method=method, budget=budgets.pop(), steps=6, reward=reward)
                if len(budgets) == 3:
                    engine.abort(id)
            device.clear()
            batches = len(engine.core.scheduler.batches)
            engine.step()
            if len(engine.core.scheduler.batches) == batches:
                yield sum(device.waits.values())


@pytest.mark.parametrize("reward", ["device", "host"])
@pytest.mark.parametrize("method", METHODS)
def test_no_round_waits_whoever_joins_and_leaves(method: str, reward: str) -> None:
    found = list(waits(method, reward, RewardOnDevice()))
    assert len(found) > 10 and not any(found)


def test_a_reward_that_waits_would_show() -> None:
    assert sum(waits("svdd", "device", Item())) > 10


def test_a_failing_reward_is_what_its_own_request_hears() -> None:
    engine = toy().engine()
    engine.add_request(FAILS, reward="host", id="guilty", **toy().params_of("svdd"))
    engine.add_request(CYCLE[0], reward="host", id="other", **toy().params_of("svdd"))
    last = {event.id: event for event in engine.stream()}
    assert isinstance(last["guilty"].error, RewardError) and "no such shade" in str(last["guilty"].error)
    assert isinstance(last["other"], flowfast.Finished)
