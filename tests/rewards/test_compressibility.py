"""Minus the kB of a JPEG of quality 95."""

from __future__ import annotations

import io

import pytest
import torch
from PIL import Image

from flowfast.errors import OptionError, RewardError
from flowfast.rewards import on_host
from flowfast.rewards.compressibility import load
from flowfast.rewards.pixels import to_pixels

NOISE = torch.rand(3, 3, 24, 40, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


def test_it_is_the_size_of_the_file() -> None:
    reward = load()
    assert on_host(reward)
    assert reward.range == (float("-inf"), 0)
    scores = reward(NOISE, PROMPTS)
    for image, score in zip(NOISE, scores.tolist(), strict=True):
        file = io.BytesIO()
        array = (image * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(array).save(file, "JPEG", quality=95)
        assert score == pytest.approx(-len(file.getvalue()) / 1000)
        assert Image.open(file).size == (40, 24)
    alone = [float(reward(NOISE[i : i + 1], PROMPTS[i : i + 1])) for i in range(3)]
    assert alone == scores.tolist()


def test_less_is_higher() -> None:
    flat, noise = load()(torch.stack([torch.full((3, 24, 40), 0.3), NOISE[0]]), ["a", "b"]).tolist()
    assert noise < 2 * flat < 0


def test_values_outside_are_clamped_and_rounded() -> None:
    image = torch.tensor([-1.0, 0.0, 0.4 / 255, 0.6 / 255, 1.0, 7.0, float("nan")]).expand(1, 3, 1, 7)
    assert to_pixels(image)[0, 0, 0].tolist() == [0, 0, 0, 1, 255, 255, 0]


def test_what_it_refuses() -> None:
    with pytest.raises(OptionError, match="takes no argument, got '80'"):
        load("80")
    with pytest.raises(RewardError, match=r"expected images \(N, 3, H, W\), got \(2, 5, 3, 8, 8\); for video"):
        load()(torch.zeros(2, 5, 3, 8, 8), ["a", "b"])
