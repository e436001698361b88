"""LAION's aesthetic predictor on a tiny CLIP tower and a random head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from flowfast.errors import RewardError, WeightError
from flowfast.rewards import aesthetic, load
from tests.models.tiny import parts
from tests.rewards import tiny

PROMPTS = ["a", "b", "c"]
T = torch.zeros(3)


def head(width: int = 16) -> nn.Sequential:
    """As the author's: five linear layers, dropout between the first of them."""
    torch.manual_seed(2)
    sizes = (width, 24, 12, 8, 4, 1)
    linear = [nn.Linear(a, b) for a, b in zip(sizes[:-1], sizes[1:], strict=True)]
    for layer in linear:
        nn.init.normal_(layer.weight, std=0.8)
    drop = nn.Dropout(0.2)
    return nn.Sequential(linear[0], drop, linear[1], drop, linear[2], drop, linear[3], linear[4]).eval()


def named(layers: nn.Sequential) -> dict[str, Tensor]:
    return {f"layers.{name}": value.detach() for name, value in layers.state_dict().items()}


def save_aesthetic(place: Path) -> Path:
    """Tower and head in one file, as the default id has them."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    tower = parts.spread(CLIPVisionModelWithProjection(CLIPVisionConfig(**tiny.VISION)).eval())
    tower.save_pretrained(place)  # type: ignore[operator]
    tiny.image_processor().save_pretrained(place)
    save_file(tower.state_dict() | named(head()), place / "model.safetensors", metadata={"format": "pt"})
    return place


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_aesthetic(tmp_path_factory.mktemp("aesthetic"))


@pytest.fixture
def reward(folder: Path) -> Any:
    return load(f"aesthetic:{folder}")


def test_it_is_the_head_on_transformers_own_tower(reward: Any, folder: Path) -> None:
    from transformers import CLIPVisionModelWithProjection

    batch = tiny.images(3)
    with torch.no_grad():
        embedding = CLIPVisionModelWithProjection.from_pretrained(folder).eval()(reward.pixels(batch)).image_embeds
        expected = head()(embedding / embedding.norm(dim=-1, keepdim=True)).squeeze(1)
    found = reward(batch, T, reward.encode(PROMPTS))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert all(reward.range[0] <= score <= reward.range[1] for score in found.tolist())


def test_a_head_in_a_file_of_its_own(reward: Any, folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    save_file(named(head()), tmp_path / "head.safetensors")
    monkeypatch.setattr(aesthetic, "TOWER", str(tiny.save_clip(tmp_path / "clip")))  # a whole CLIPModel
    other = load(f"aesthetic:{tmp_path / 'head.safetensors'}")
    assert torch.equal(other.weight, reward.weight) and torch.equal(other.bias, reward.bias)
    assert not torch.equal(other(tiny.images(3), T, {}), reward(tiny.images(3), T, {}))  # its tower is another


def test_alone_and_in_a_batch(reward: Any) -> None:
    tiny.same_alone_and_in_a_batch(reward, tiny.images(3), PROMPTS)


def test_the_device_does_not_wait(reward: Any) -> None:
    tiny.reads_no_values(reward, tiny.images(3), PROMPTS)


def test_gradient(reward: Any) -> None:
    tiny.gradient_is_finite_differences(reward, tiny.images(3), PROMPTS)


def test_wrong_input_is_rejected(reward: Any) -> None:
    with pytest.raises(RewardError, match="'aesthetic': expected images"):
        reward(torch.zeros(3, 8, 8), T, {})


def test_weights_that_are_missing_or_do_not_fit(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(WeightError, match=f"`hf download {aesthetic.DEFAULT}`"):
        load("aesthetic")
    with pytest.raises(WeightError, match="no file '.*head.safetensors'"):
        aesthetic.Aesthetic(str(tmp_path / "head.safetensors"), str(folder))
    with pytest.raises(WeightError, match="got none"):
        load(f"aesthetic:{tiny.save_clip(tmp_path / 'clip')}")
    save_file(named(head(20)), tmp_path / "wide.safetensors")
    with pytest.raises(WeightError, match="for embeddings of 20 numbers, but .* gives 16"):
        aesthetic.Aesthetic(str(tmp_path / "wide.safetensors"), str(folder))
    relu = {name.replace("layers.2.", "layers.3."): value for name, value in named(head()).items()}
    save_file(relu, tmp_path / "relu.safetensors")
    with pytest.raises(WeightError, match="the head with ReLU is another model"):
        aesthetic.Aesthetic(str(tmp_path / "relu.safetensors"), str(folder))
    torch.save(named(head()), tmp_path / "pickle.safetensors")
    with pytest.raises(WeightError, match="expected a safetensors file"):
        aesthetic.Aesthetic(str(tmp_path / "pickle.safetensors"), str(folder))
