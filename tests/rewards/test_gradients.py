"""A reward that says it is differentiable has the gradient of finite differences; those on transformers are held to
it in their own files."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowfast.rewards import DIFFERENTIABLE, NAMES, load, on_host
from flowfast.rewards.frames import frames
from tests.rewards import tiny
from tests.rewards.test_aesthetic import save_aesthetic
from tests.rewards.test_counting import grounding_dino
from tests.rewards.test_vqa_score import save_llava

NOISE = torch.rand(3, 2, 3, 32, 32, generator=torch.Generator().manual_seed(0))  # no equal pixels: |x| has a kink
PROMPTS = ["two red circles", "a red circle above a blue square", "three green crosses"]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every built-in reward, on a tiny checkpoint where it needs one."""
    folder = tmp_path_factory.mktemp("rewards")
    clip = tiny.save_clip(folder / "clip")
    grounding_dino(folder / "dino")
    arguments = {
        "clipscore": clip,
        "pickscore": clip,
        "hpsv2": clip,
        "aesthetic": save_aesthetic(folder / "aesthetic"),
        "vqascore": save_llava(folder / "vlm"),
        "counting": folder / "dino",
        "http": "//127.0.0.1:9/score",
        "frames": "sharpness",
    }
    # On the host run ocr, whose engine is an optional package, and ray, which is another process.
    names = [name for name in NAMES if name not in ("ocr", "ray")]
    return {name: load(f"{name}:{arguments[name]}" if name in arguments else name) for name in names}


def test_the_list_of_differentiable_rewards_is_what_they_declare(loaded: dict[str, Any]) -> None:
    declared = {name for name, reward in loaded.items() if reward.differentiable}
    assert declared - {"frames"} == set(DIFFERENTIABLE)
    assert not any(on_host(loaded[name]) for name in declared)
    assert loaded["frames"].differentiable  # as the reward of a frame is
    assert not frames(lambda images, prompts: [0.0] * len(images)).differentiable


@pytest.mark.parametrize("name", ["sharpness", "scenes"])
def test_the_gradient_is_finite_differences(loaded: dict[str, Any], name: str) -> None:
    tiny.gradient_is_finite_differences(loaded[name], NOISE[:, 0], PROMPTS)


def test_so_is_that_of_a_weighted_sum_and_of_frames(loaded: dict[str, Any]) -> None:
    clip = loaded["clipscore"].model_id
    tiny.gradient_is_finite_differences(load(f"clipscore:{clip}*0.7+sharpness*-2"), NOISE[:, 0], PROMPTS)
    for how in ("mean", "min"):
        tiny.gradient_is_finite_differences(frames("sharpness", how), NOISE, PROMPTS)


def test_a_sum_with_a_reward_on_the_host_has_none(loaded: dict[str, Any]) -> None:
    assert not load("sharpness+compressibility").differentiable
