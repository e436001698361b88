"""HPS v2 on a tiny CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flowfast.errors import OptionError, RewardError, WeightError
from flowfast.rewards import hpsv2, load
from tests.rewards import tiny

PROMPTS = ["a red cat", "two dogs on a blue sofa", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("hps"), seed=2)


@pytest.fixture
def reward(folder: Path) -> Any:
    return load(f"hpsv2:{folder}")


def test_it_is_a_hundred_cosines_of_transformers(reward: Any, folder: Path) -> None:
    """Whatever the checkpoint's own logit scale, 3 here."""
    from transformers import AutoTokenizer, CLIPModel

    batch = tiny.images(3)
    tokens = AutoTokenizer.from_pretrained(folder)(PROMPTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        own = CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=reward.pixels(batch))
    expected = 100 * torch.nn.functional.cosine_similarity(own.image_embeds, own.text_embeds)
    found = reward(batch, torch.zeros(3), reward.encode(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)
    assert (reward.name, reward.range, reward.differentiable) == ("hpsv2", (-100.0, 100.0), True)


def test_alone_and_in_a_batch(reward: Any) -> None:
    tiny.same_alone_and_in_a_batch(reward, tiny.images(3), PROMPTS)


def test_the_device_does_not_wait(reward: Any) -> None:
    tiny.reads_no_values(reward, tiny.images(3), PROMPTS)


def test_gradient(reward: Any) -> None:
    tiny.gradient_is_finite_differences(reward, tiny.images(3), PROMPTS)


def test_a_folder_without_a_processor_takes_clip_hs(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.save_clip(tmp_path, seed=2, processor=False)
    monkeypatch.setattr(hpsv2, "CLIP_H", str(folder))
    batch, t = tiny.images(3), torch.zeros(3)
    one, two = (load(f"hpsv2:{place}") for place in (tmp_path, folder))
    assert torch.equal(one(batch, t, one.encode(PROMPTS)), two(batch, t, two.encode(PROMPTS)))


def test_what_is_missing_is_named(reward: Any, tmp_path: Path) -> None:
    with pytest.raises(
        OptionError, match=r"hpsv2:ID_OR_FOLDER of a transformers CLIPModel in safetensors\. xswu/HPSv2"
    ):
        load("hpsv2")
    with pytest.raises(WeightError, match="cannot load"):
        load(f"hpsv2:{tmp_path}")
    with pytest.raises(RewardError, match="'hpsv2': expected images"):
        reward(torch.zeros(3, 4, 8, 8), torch.zeros(3), reward.encode(PROMPTS))
