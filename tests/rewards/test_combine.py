"""Weighted sums and rank ensembles: values, batches, scripting, NaN."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from flowfast.errors import RewardError
from flowfast.rewards import CallableReward, load, on_host, rank_ensemble, weighted_sum
from flowfast.rewards.combine import rank_in
from flowfast.rewards.sharpness import Sharpness

N = 13
IMAGES = torch.rand(N, 3, 9, 7, generator=torch.Generator().manual_seed(1))
PROMPTS = ["x" * i for i in range(N)]
T = torch.linspace(0, 1, N)


class Length(nn.Module):
    """A device reward that needs its condition and its time: length of the prompt minus t."""

    def __init__(self) -> None:
        super().__init__()
        self.name = "length"
        self.range = (-1.0, 100.0)
        self.differentiable = True

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"length": torch.tensor([float(len(p)) for p in prompts])}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return cond["length"] - t


def brightness(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3))


def test_sharpness_is_what_it_says_alone_and_batched() -> None:
    reward, image = Sharpness(), torch.zeros(1, 3, 2, 2)
    image[..., 1] = 1.0  # one vertical edge: every horizontal difference is 1, every vertical one 0
    assert reward(image, torch.zeros(1), {}).tolist() == [0.5]
    together = reward(IMAGES, T, reward.encode(PROMPTS))
    alone = torch.cat([reward(IMAGES[i : i + 1], T[i : i + 1], {}) for i in range(N)])
    torch.testing.assert_close(together, alone)
    assert together.dtype is torch.float32


def test_weighted_sum_of_modules_is_a_module() -> None:
    both = weighted_sum([Sharpness(), Length()], [0.25, -2.0])
    assert not on_host(both)
    assert both.name == "sharpness*0.25+length*-2"
    assert both.range == (-200.0, 2.25)
    want = 0.25 * Sharpness()(IMAGES, T, {}) - 2.0 * (torch.arange(float(N)) - T)
    torch.testing.assert_close(both(IMAGES, T, both.encode(PROMPTS)), want)


def test_it_scripts() -> None:
    for both in (
        weighted_sum([Sharpness(), Length()], [0.25, -2.0]),
        rank_ensemble([Sharpness(), Length()], IMAGES, PROMPTS),
    ):
        scripted = torch.jit.script(both)
        assert torch.equal(scripted(IMAGES, T, scripted.encode(PROMPTS)), both(IMAGES, T, both.encode(PROMPTS)))


def test_one_host_member_makes_it_a_host_reward() -> None:
    both = weighted_sum([Length(), CallableReward(brightness)], [1.0, 3.0])
    assert on_host(both)
    torch.testing.assert_close(both(IMAGES, PROMPTS, T), torch.arange(float(N)) - T + 3 * IMAGES.mean((1, 2, 3)))


def test_a_bad_member_is_named() -> None:
    both = weighted_sum([Length(), CallableReward(lambda images, prompts: [0.0], name="short")], [1.0, 1.0])
    with pytest.raises(RewardError, match="reward 'short'"):
        both(IMAGES, PROMPTS)


def test_sum_by_name() -> None:
    both = load("sharpness*0.7 + sharpness*0.3")
    torch.testing.assert_close(both(IMAGES, T, both.encode(PROMPTS)), Sharpness()(IMAGES, T, {}))


def test_ranks_within_a_reference() -> None:
    reference = torch.tensor([0.0, 1.0, 3.0, 3.0, 7.0])
    score = torch.tensor([0.0, 0.5, 1.0, 2.0, 3.0, 5.0, 7.0, 14.0, -7.0, float("nan"), float("-inf")])
    ranks = rank_in(reference, score)
    want = torch.tensor([0.0, 0.125, 0.25, 0.375, 0.75, 0.875, 1.0, 2.0, -1.0, float("nan"), float("-inf")])
    torch.testing.assert_close(ranks, want, equal_nan=True)


def test_ranks_keep_the_order_and_forget_the_scale() -> None:
    big = CallableReward(lambda images, prompts: 1000 * images.mean((1, 2, 3)) - 40, name="big")
    small = CallableReward(brightness)
    mixed = rank_ensemble([big, small], IMAGES, PROMPTS)(IMAGES, PROMPTS)
    alone = rank_ensemble([small], IMAGES, PROMPTS)(IMAGES, PROMPTS)
    torch.testing.assert_close(mixed, alone, atol=1e-4, rtol=0)
    assert torch.equal(mixed.argsort(), brightness(IMAGES, PROMPTS).argsort())
    assert float(mixed.min()) == 0
    assert float(mixed.max()) == 1


def test_a_rank_does_not_depend_on_the_batch() -> None:
    both = rank_ensemble([Sharpness(), Length()], IMAGES, PROMPTS, weights=[3, 1])
    together = both(IMAGES, T, both.encode(PROMPTS))
    alone = torch.cat([both(IMAGES[i : i + 1], T[i : i + 1], both.encode(PROMPTS[i : i + 1])) for i in range(N)])
    torch.testing.assert_close(together, alone)


def test_nan_of_one_member_never_wins() -> None:
    nan = CallableReward(lambda images, prompts: [float("nan")] + [0.0] * (len(prompts) - 1), name="nan")
    assert torch.isnan(weighted_sum([Length(), nan], [1.0, 1e-9])(IMAGES, PROMPTS)).sum() == 1
    with pytest.raises(RewardError, match="reward 'nan': a rank needs"):
        rank_ensemble([nan], IMAGES, PROMPTS)


@pytest.mark.parametrize("weights", [[], [1.0], [1.0, float("nan")], [1.0, float("inf")]])
def test_weights_must_fit(weights: list[float]) -> None:
    with pytest.raises(RewardError, match="expected one finite weight"):
        weighted_sum([Sharpness(), Length()], weights)
