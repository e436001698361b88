"""The reward actor without Ray: what it batches, that nobody sees it in the scores, and who pays for a fault."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowfast import rewards
from flowfast.errors import OptionError
from flowfast.ray import rewards as of_ray
from flowfast.ray.rewards import RewardActor
from flowfast.rewards import CallableReward
from flowfast.rewards.http import pack


class Device(nn.Module):
    """A reward on the device, whose products have bits that depend on the number of rows."""

    name, range, differentiable = "device", (-1e9, 1e9), False

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []
        self.register_buffer("weight", torch.randn(192, 64, generator=torch.Generator().manual_seed(1)))

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"length": torch.tensor([float(len(prompt)) for prompt in prompts])}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.calls.append(len(images))
        return (images.flatten(1) @ self.weight).tanh().sum(1) + cond["length"]


def body(seed: int, count: int, prompt: str = "one") -> bytes:
    generator = torch.Generator().manual_seed(seed)
    return pack(torch.randint(0, 256, (count, 3, 8, 8), generator=generator, dtype=torch.uint8), [prompt] * count)


def ask(actor: RewardActor, bodies: list[bytes]) -> list[dict[str, Any]]:
    async def together() -> list[dict[str, Any]]:
        return await asyncio.gather(*map(actor.score, bodies))

    return asyncio.run(together())


BODIES = [body(seed, 1 + 5 * seed % 7) for seed in range(12)]


def test_scores_are_to_the_bit_those_of_a_request_alone() -> None:
    alone = [ask(RewardActor(Device()), [each])[0] for each in BODIES]
    device = Device()
    assert ask(RewardActor(device), BODIES) == alone
    assert set(device.calls) == {of_ray.ROWS}
    assert len(device.calls) < len(BODIES)  # requests shared calls
    reordered = ask(RewardActor(Device()), BODIES[::-1])
    assert reordered[::-1] == alone


def test_a_callable_sees_one_request_in_a_call_unless_it_says_that_it_may_see_several() -> None:
    for independent in (False, True):
        calls: list[int] = []

        def counted(images: Tensor, prompts: Sequence[str], calls: list[int] = calls) -> list[float]:
            calls.append(len(prompts))
            return images.mean((1, 2, 3)).tolist()

        actor = RewardActor(CallableReward(counted, independent=independent))
        assert asyncio.run(actor.about())["independent"] is independent
        found = ask(actor, BODIES)
        sizes = [1 + 5 * seed % 7 for seed in range(12)]
        assert [len(each["scores"]) for each in found] == sizes
        assert (sorted(calls) == sorted(sizes)) is not independent and sum(calls) == sum(sizes)
        assert max(calls) <= rewards.host.MOST_IMAGES


def test_only_the_guilty_fail() -> None:
    def picky(images: Tensor, prompts: Sequence[str]) -> list[float]:
        if "bad" in prompts:
            raise ValueError("cannot look at bad")
        return [1.0] * len(prompts)

    found = ask(RewardActor(CallableReward(picky, independent=True)), [body(0, 2), body(1, 1, "bad"), body(2, 3)])
    assert found[0] == {"scores": [1.0] * 2} and found[2] == {"scores": [1.0] * 3}
    assert found[1]["kind"] == "reward" and "cannot look at bad" in found[1]["error"]


def test_what_is_no_request_is_an_error() -> None:
    (found,) = ask(RewardActor(Device()), [b"nonsense"])
    assert "safetensors" in found["error"]


def test_who_asks_when_too_much_is_held_is_told_to_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_ray, "MOST_WAITING", 10)
    begun, go = threading.Event(), threading.Event()

    def held(images: Tensor, prompts: Sequence[str]) -> list[float]:
        begun.set()
        assert go.wait(20)
        return [0.0] * len(prompts)

    actor = RewardActor(CallableReward(held))

    async def together() -> None:
        first = [asyncio.ensure_future(actor.score(body(seed, 4))) for seed in range(2)]
        await asyncio.to_thread(begun.wait, 20)
        busy = await actor.score(body(2, 4))
        assert busy["busy"] > 0
        small = asyncio.ensure_future(actor.score(body(3, 2)))  # for that there is room
        await asyncio.sleep(0)
        go.set()
        assert len((await small)["scores"]) == 2
        assert [len(each["scores"]) for each in await asyncio.gather(*first)] == [4, 4]
        assert actor.held == 0
        assert len((await actor.score(body(4, 20)))["scores"]) == 20  # larger than the room, but alone

    asyncio.run(together())


def test_the_name_is_needed() -> None:
    with pytest.raises(OptionError, match="write ray:NAME"):
        rewards.load("ray")
    assert rewards.parse("ray:clip*0.5+sharpness")[0].argument == "clip"
