"""PickScore on a tiny CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowfast.errors import RewardError, WeightError
from flowfast.rewards import load, pick_score
from tests.rewards import tiny

PROMPTS = ["a red cat", "two dogs on a blue sofa", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("pick"), seed=1)


@pytest.fixture
def reward(folder: Path) -> Any:
    return load(f"pickscore:{folder}")


def test_it_is_transformers_logits(reward: Any, folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    batch = tiny.images(3)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        own = CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=reward.pixels(batch))
    found = reward(batch, torch.zeros(3), reward.encode(PROMPTS))
    torch.testing.assert_close(found, own.logits_per_image.diagonal(), rtol=1e-5, atol=1e-5)
    assert reward.range == pytest.approx((-20.0855, 20.0855), abs=1e-3) and reward.revision == "local"


def test_pixels_by_the_processor_change_little(reward: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole score with the processor's own 8-bit pixels: within 1% of the scale."""
    from transformers import AutoImageProcessor

    batch = (tiny.images(3) * 255).round() / 255
    cond = reward.encode(PROMPTS)
    found = reward(batch, torch.zeros(3), cond)
    own = AutoImageProcessor.from_pretrained(folder)(tiny.pictures(batch), return_tensors="pt")["pixel_values"]
    monkeypatch.setattr(reward.pixels, "forward", lambda images: own)
    torch.testing.assert_close(found, reward(batch, torch.zeros(3), cond), rtol=0, atol=0.01 * reward.scale)


def test_alone_and_in_a_batch(reward: Any) -> None:
    tiny.same_alone_and_in_a_batch(reward, tiny.images(3), PROMPTS)


def test_the_device_does_not_wait(reward: Any) -> None:
    tiny.reads_no_values(reward, tiny.images(3), PROMPTS)


def test_gradient(reward: Any) -> None:
    tiny.gradient_is_finite_differences(reward, tiny.images(3), PROMPTS)


def test_a_folder_without_a_processor_takes_clip_hs(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As yuvalkirstain/PickScore_v1 is used: model and processor come from two repositories."""
    tiny.save_clip(tmp_path, seed=1, processor=False)
    monkeypatch.setattr(pick_score, "PROCESSOR", str(folder))
    batch, t = tiny.images(3), torch.zeros(3)
    one, two = (load(f"pickscore:{place}") for place in (tmp_path, folder))
    assert torch.equal(one(batch, t, one.encode(PROMPTS)), two(batch, t, two.encode(PROMPTS)))


def test_wrong_input_is_rejected(reward: Any) -> None:
    with pytest.raises(RewardError, match="'pickscore': expected images"):
        reward(torch.zeros(3, 4, 8, 8), torch.zeros(3), reward.encode(PROMPTS))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="'yuvalkirstain/PickScore_v1'.*`hf download yuvalkirstain/PickScore_v1`"):
        load("pickscore")
    tiny.save_clip(tmp_path, processor=False)
    with pytest.raises(WeightError, match="`hf download laion/CLIP-ViT-H-14-laion2B-s32B-b79K`"):
        load(f"pickscore:{tmp_path}")
