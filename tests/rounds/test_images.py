"""Images that are not finite: a decoder that gives NaN or infinity for some latents. In 8 bits that is a black picture,
so no reward can be trusted to see it."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.archive.load import load_archive
from flowfast.errors import ModelError
from flowfast.ops.noise import noise_key
from flowfast.rewards.compressibility import compressibility
from tests.toys import METHODS, GaussianFlow, NearTarget, bits, build, same

OPTIONS: dict[str, Any] = {"budget": 60, "steps": 6, "micro_batch": 8}
BRANCHING = [method for method in METHODS if method != "ode"]


class Holes(GaussianFlow):
    """One pixel of the picture of many a latent is no number."""

    def __init__(self, hole: float = math.nan, shape: tuple[int, ...] = (3,)):
        super().__init__(shape)
        self.hole = hole

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        images = x0.clone()
        last = images.flatten(1)[:, -1]
        last.copy_(torch.where(x0.flatten(1)[:, 0] > 0.5, self.hole, last))
        return images


class EightBits(NearTarget):
    """Loves black: what is no number counts as 0, which is the best there is."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -torch.nan_to_num(images.flatten(1), 0.0, 0.0, 0.0)[:, -1].abs()


def eight_bits(images: Tensor, prompts: list[str]) -> list[float]:
    return (-images.flatten(1).nan_to_num(0.0, 0.0, 0.0)[:, -1].abs()).tolist()


@pytest.mark.parametrize("hole", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("reward", [EightBits(), eight_bits], ids=["device", "host"])
@pytest.mark.parametrize("method", BRANCHING)
def test_a_picture_that_is_not_finite_never_wins(method: str, reward: Any, hole: float) -> None:
    result = flowfast.search(Holes(hole), ["a", "bb"], reward=reward, method=method, top_k=3, **OPTIONS)
    assert result.nan_rewards > 0
    for sample in result.samples:
        assert all(ranked.image.isfinite().all() and ranked.reward > -math.inf for ranked in sample.top)


@pytest.mark.parametrize("overlap", [True, False])
def test_a_reward_on_the_host_is_not_shown_what_is_not_finite(overlap: bool) -> None:
    """It may raise there, as PIL or a server does; device and host agree on everything else."""
    seen = []

    def strict(images: Tensor, prompts: list[str]) -> list[float]:
        assert images.isfinite().all()
        seen.append(len(images))
        return eight_bits(images, prompts)

    results = [
        flowfast.search(Holes(), ["a", "bb"], reward=reward, method="svdd", overlap=overlap, **OPTIONS)
        for reward in (strict, EightBits())
    ]
    assert results[0].nan_rewards == results[1].nan_rewards > 0
    assert sum(seen) == sum(sample.reward_calls for sample in results[0].samples) - results[0].nan_rewards
    for one, other in zip(results[0].samples, results[1].samples, strict=True):
        assert one.winner == other.winner and torch.equal(bits(one.image), bits(other.image))


def test_a_black_jpeg_is_the_smallest_but_not_the_winner() -> None:
    """The built-in rewards over 8-bit pixels; frames of video likewise."""
    flow = Holes(shape=(3, 8, 8))
    options = {"method": "bon", **OPTIONS}
    (sample,) = flowfast.search(flow, ["a"], reward="compressibility", **options).samples
    assert sample.image.isfinite().all()
    assert sample.reward == pytest.approx(compressibility(sample.image[None], ["a"])[0])
    video = Holes(shape=(2, 3, 8, 8))
    (clip,) = flowfast.search(video, ["a"], reward="frames:compressibility", **options).samples
    assert clip.image.isfinite().all()


class Previewed(Holes):
    """The preview is sound, the full decoder has holes."""

    def __init__(self) -> None:
        super().__init__()
        self.defaults = flowfast.FlowDefaults(preview=self.rough)

    def rough(self, x0: Tensor) -> Tensor:
        return x0


class BadPreview(GaussianFlow):
    def __init__(self) -> None:
        super().__init__()
        self.defaults = flowfast.FlowDefaults(preview=self.rough)

    def rough(self, x0: Tensor) -> Tensor:
        return torch.where(x0[:, :1] > 0.5, torch.nan, x0)


@pytest.mark.parametrize("reward", [EightBits(), eight_bits], ids=["device", "host"])
def test_of_the_finalists_those_whose_full_picture_is_finite_come_out(reward: Any) -> None:
    result = flowfast.search(Previewed(), ["bb"], reward=reward, method="bon", finalists=8, top_k=8, **OPTIONS)
    assert result.nan_rewards > 0
    for sample in result.samples:
        assert 0 < len(sample.top) < 8
        assert all(ranked.image.isfinite().all() for ranked in sample.top)
    through = flowfast.search(BadPreview(), ["a"], reward=reward, method="bon", **OPTIONS)
    assert through.nan_rewards > 0 and float(through.samples[0].latent[0]) <= 0.5


def test_no_finite_picture_at_all_is_an_error_and_no_black_picture() -> None:
    class Black(GaussianFlow):
        def decode(self, x0: Tensor) -> Tensor:
            return torch.full_like(x0, torch.nan)

    for reward in (EightBits(), eight_bits, "compressibility"):
        with pytest.raises(ModelError, match="NaN"):
            flowfast.search(Black((3, 8, 8)), ["a"], reward=reward, method="svdd", **OPTIONS)


@pytest.mark.parametrize("method", METHODS)
def test_the_holes_of_one_prompt_leave_the_others_bit_identical(method: str) -> None:
    class OnePrompt(GaussianFlow):
        """Holes where the latent says that it is of the prompt "a", whose mean is lower."""

        def decode(self, x0: Tensor) -> Tensor:
            return torch.where((x0 < 0.3).any(1, keepdim=True), torch.nan, x0)

    class Above(GaussianFlow):
        def encode(self, prompts: list[str]) -> dict[str, Tensor]:
            return {"mean": torch.tensor([[0.2 if prompt == "a" else 40.0] for prompt in prompts])}

    class Both(Above, OnePrompt):
        pass

    found = []
    for flow in (Above(), Both()):
        bench = build(method, flow=flow, reward=EightBits(), budget=60)
        bench.admit(0, "bb")
        bench.admit(1, "a")
        bench.run()
        found.append(bench.engine.release(0))
    assert same(*found) == []


def test_an_archive_gives_the_bits_of_python(tmp_path: Path) -> None:
    flow = Holes()
    options: dict[str, Any] = {"method": "svdd", "steps": 6, "micro_batch": 8, "top_k": 2}
    flowfast.export(flow, tmp_path / "holes.ffa", reward=EightBits(), budget=60, slots=1, **options)
    archive = load_archive(tmp_path / "holes.ffa")
    archive.admit(0, archive.encode(["a"]), {}, noise_key(0, "a"), 60, 1.0, math.inf)
    archive.search()
    found = archive.release(0)
    result = flowfast.search(flow, ["a"], reward=EightBits(), budget=60, slots=1, **options)
    assert found["cost"].tolist()[3] == result.nan_rewards > 0
    assert found["reward"].tolist() == [ranked.reward for ranked in result.samples[0].top]
    assert torch.equal(bits(found["image"][0]), bits(result.samples[0].image))


def test_an_archive_puts_the_finite_picture_first(tmp_path: Path) -> None:
    """A decoder that breaks on one latent alone, which is how samples are decoded at the end."""

    class Alone(GaussianFlow):
        @torch.jit.export
        def decode(self, x0: Tensor) -> Tensor:
            return torch.where(x0[:, :1] > 0.5, torch.nan, x0) if x0.size(0) == 1 else x0

    options: dict[str, Any] = {"method": "bon", "steps": 6, "micro_batch": 8, "top_k": 4, "budget": 60}
    flowfast.export(Alone(), tmp_path / "alone.ffa", reward=EightBits(), slots=1, **options)
    archive = load_archive(tmp_path / "alone.ffa")
    archive.admit(0, archive.encode(["bb"]), {}, noise_key(0, "bb"), 60, 1.0, math.inf)
    archive.search()
    found = archive.release(0)
    (sample,) = flowfast.search(Alone(), ["bb"], reward=EightBits(), slots=1, **options).samples
    assert 0 < len(sample.top) < 4
    assert found["reward"].tolist()[: len(sample.top)] == [ranked.reward for ranked in sample.top]
    assert found["reward"][len(sample.top) :].eq(-math.inf).all()
    assert torch.equal(found["x0"][0], sample.latent)


class Sometimes(GaussianFlow):
    """Latents are the pictures, but for some rounds, in which one picture in two breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def decode(self, x0: Tensor) -> Tensor:
        self.calls += 1
        if self.calls % 3:
            return x0
        images = x0.clone()
        images[::2] = torch.nan
        return images


def test_latents_as_pictures_are_not_looked_at_twice_nor_with_what_was_said_before() -> None:
    bench = build("svdd", flow=Sometimes(), slots=1, micro_batch=64, score_all=True)
    bench.admit(0, "a")
    engine = bench.engine
    while engine.width():
        images = engine.propose()
        looked = images.isfinite().flatten(1).all(1)
        assert torch.equal(engine.image_sum[: len(images)].isfinite(), looked)
        engine.observe(engine.score(images))
    assert engine.flow.calls > 6
