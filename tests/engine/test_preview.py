"""A search that looks through a preview decoder: its finalists are decoded in full, scored again and ranked anew."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError, OptionError
from tests.toys import METHODS, GaussianFlow, NearTarget

OPTIONS = {"budget": 60, "steps": 6, "micro_batch": 8}
PROMPTS = ["a", "bb", "ccc"]


class Mirrored(GaussianFlow):
    """Samples lie below the target of the last coordinate, their previews above it: the order is reversed."""

    def __init__(self) -> None:
        super().__init__()
        self.defaults = flowfast.FlowDefaults(preview=self.rough)

    def rough(self, x0: Tensor) -> Tensor:
        return x0 + torch.tensor([0.0, 0.0, 4.0])


class Third(NearTarget):
    """The last coordinate alone decides: near 2 is good."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -(images[:, 2] - 2.0).abs()


def on_host(images: Tensor, prompts: list[str]) -> Tensor:
    return -(images[:, 2] - 2.0).abs()


def score(image: Tensor) -> float:
    return -abs(float(image[2]) - 2.0)


@pytest.mark.parametrize("reward", [Third(), on_host], ids=["device", "host"])
@pytest.mark.parametrize("method", METHODS)
def test_the_full_decoder_has_the_last_word(method: str, reward: Any) -> None:
    """All that is finished comes back in the order of full rewards; what the preview preferred is not first."""
    flow = Mirrored()
    result = flowfast.search(flow, PROMPTS, reward=reward, method=method, top_k=4, **OPTIONS)
    assert result.config.finalists == 4
    for sample in result.samples:
        rewards = [ranked.reward for ranked in sample.top]
        assert rewards == sorted(rewards, reverse=True) and len(set(rewards)) == len(rewards)
        for ranked in sample.top:
            assert torch.equal(ranked.image, ranked.latent)
            assert ranked.reward == pytest.approx(score(ranked.image), abs=1e-6)
            assert ranked.preview_reward == pytest.approx(score(flow.rough(ranked.latent)), abs=1e-6)
        previews = [ranked.preview_reward for ranked in sample.top]
        assert method == "ode" or previews != sorted(previews, reverse=True), "the orders agree: an empty test"
    few = flowfast.search(flow, PROMPTS, reward=reward, method=method, finalists=1, **OPTIONS)
    for all_of_them, one in zip(result.samples, few.samples, strict=True):
        assert one.top[0].preview_reward == max(ranked.preview_reward for ranked in all_of_them.top)
        assert one.winner in [ranked.winner for ranked in all_of_them.top]
        assert one.reward_calls == all_of_them.reward_calls - len(all_of_them.top) + 1
        assert one.reward <= all_of_them.reward


def test_the_winner_changes() -> None:
    pairs = []
    for finalists in (1, 4):
        result = flowfast.search(Mirrored(), PROMPTS, reward=Third(), method="bon", finalists=finalists, **OPTIONS)
        pairs.append([(sample.winner, sample.reward) for sample in result.samples])
    for (winner, reward), (other, higher) in zip(*pairs, strict=True):
        assert winner != other and higher > reward


@pytest.mark.parametrize("method", ["bon", "rbf", "smc"])
def test_reward_calls_are_all_that_the_reward_saw(method: str) -> None:
    calls: list[int] = []

    def counted(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(prompts))
        return on_host(images, prompts)

    result = flowfast.search(Mirrored(), PROMPTS, reward=counted, method=method, **OPTIONS)
    assert sum(calls) == sum(sample.reward_calls for sample in result.samples)
    assert max(sample.nfe for sample in result.samples) <= 60  # decoding again costs no evaluation


@pytest.mark.parametrize("method", METHODS)
def test_replay_and_rerun_give_the_winner(method: str) -> None:
    flow, reward = Mirrored(), Third()
    result = flowfast.search(flow, PROMPTS, reward=reward, method=method, **OPTIONS)
    again = flowfast.search(flow, PROMPTS, reward=reward, config=result.config)
    for sample, other in zip(result.samples, again.samples, strict=True):
        assert torch.equal(flowfast.replay(flow, sample, result.config)[-1][1], sample.image)
        assert (sample.winner, sample.reward, sample.reward_calls) == (other.winner, other.reward, other.reward_calls)


def test_nan_of_the_full_decoder_loses_and_nan_throughout_is_an_error() -> None:
    class Broken(Mirrored):
        def decode(self, x0: Tensor) -> Tensor:
            return torch.where(x0[:, 2:] > float(worst), torch.nan, x0)

    worst = torch.tensor(torch.inf)
    options = {"reward": Third(), "method": "bon", **OPTIONS}
    whole = flowfast.search(Broken(), PROMPTS, top_k=4, **options)
    top = whole.samples[0].top
    worst = torch.tensor((float(top[0].latent[2]) + float(top[1].latent[2])) / 2)  # the best of the first prompt is NaN
    half = flowfast.search(Broken(), PROMPTS[:1], top_k=4, **options)
    assert [ranked.winner for ranked in half.samples[0].top] == [ranked.winner for ranked in top[1:]]
    assert half.nan_rewards == 1
    worst = torch.tensor(-torch.inf)
    with pytest.raises(ModelError, match="no finished sample"):
        flowfast.search(Broken(), PROMPTS, **options)


def test_a_killed_search_keeps_both_rewards(tmp_path: Path) -> None:
    path, options = tmp_path / "search.safetensors", {"reward": Third(), "method": "svdd", "top_k": 2, **OPTIONS}
    first = flowfast.search(Mirrored(), PROMPTS, checkpoint=path, **options)
    again = flowfast.search(Mirrored(), PROMPTS, checkpoint=path, **options)
    for sample, other in zip(first.samples, again.samples, strict=True):
        assert [(r.reward, r.preview_reward) for r in sample.top] == [(r.reward, r.preview_reward) for r in other.top]


def test_an_own_model_has_a_preview_too_and_compile_compiles_it(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(function: Any, dynamic: bool) -> Any:
        asked.append(function)
        return function

    monkeypatch.setattr(torch, "compile", fake)
    plain = Mirrored()
    flow = flowfast.flow_from(plain.velocity, (3,), encode=plain.encode, preview=plain.rough)
    found = [
        flowfast.search(flow, PROMPTS, reward=Third(), method="bon", compile=wanted, **OPTIONS)
        for wanted in (False, True)
    ]
    assert asked == [flow.velocity, plain.rough]
    expected = flowfast.search(plain, PROMPTS, reward=Third(), method="bon", **OPTIONS)
    for result in found:
        assert [sample.winner for sample in result.samples] == [sample.winner for sample in expected.samples]


def test_what_finalists_cannot_be_is_named() -> None:
    with pytest.raises(OptionError, match="finalists are for a model with a preview decoder"):
        flowfast.search(GaussianFlow(), PROMPTS, reward=Third(), finalists=3, **OPTIONS)
    with pytest.raises(OptionError, match="finalists must be at least top_k, 3, got 2"):
        flowfast.search(Mirrored(), PROMPTS, reward=Third(), finalists=2, top_k=3, **OPTIONS)
    result = flowfast.search(Mirrored(), PROMPTS, reward=Third(), method="bon", top_k=6, **OPTIONS)
    assert result.config.finalists == 6
