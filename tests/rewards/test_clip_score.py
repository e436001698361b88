"""CLIPScore on a tiny CLIP, and the tensors in the place of an image processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from flowfast.errors import RewardError, WeightError
from flowfast.rewards import load
from flowfast.rewards._clip import Pixels
from tests.rewards import tiny

PROMPTS = ["a red cat", "two dogs on a blue sofa", ""]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def reward(folder: Path) -> Any:
    return load(f"clipscore:{folder}")


def test_it_is_the_papers_formula_on_transformers_own_model(reward: Any, folder: Path) -> None:
    from transformers import AutoTokenizer, CLIPModel

    batch = tiny.images(3)
    tokens = AutoTokenizer.from_pretrained(folder)(
        ["A photo depicts " + prompt for prompt in PROMPTS], padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        own = CLIPModel.from_pretrained(folder).eval()(**tokens, pixel_values=reward.pixels(batch))
    cosine = (own.image_embeds * own.text_embeds).sum(-1)
    found = reward(batch, torch.zeros(3), reward.encode(PROMPTS))
    torch.testing.assert_close(found, 2.5 * cosine.clamp(min=0), rtol=1e-5, atol=1e-5)
    assert reward.range == (0.0, 2.5) and reward.revision == "local" and reward.differentiable


def test_a_negative_cosine_counts_as_zero(reward: Any) -> None:
    cond = reward.encode(PROMPTS)
    up, down = (reward(tiny.images(3), torch.zeros(3), {"text": sign * cond["text"]}) for sign in (1, -1))
    assert ((up == 0) != (down == 0)).all()


def test_alone_and_in_a_batch(reward: Any) -> None:
    tiny.same_alone_and_in_a_batch(reward, tiny.images(3), PROMPTS)


def test_the_device_does_not_wait(reward: Any) -> None:
    tiny.reads_no_values(reward, tiny.images(3), PROMPTS)


def test_gradient(reward: Any) -> None:
    sign = reward.cosine(tiny.images(3), reward.encode(PROMPTS)).sign()
    encode = reward.encode
    reward.encode = lambda prompts: {"text": encode(prompts)["text"] * sign[:, None]}  # where it is not clamped
    tiny.gradient_is_finite_differences(reward, tiny.images(3), PROMPTS)


def test_long_prompts_are_cut(reward: Any) -> None:
    assert torch.equal(reward.encode(["x" * 500])["text"], reward.encode(["x" * 400])["text"])


@pytest.mark.parametrize(
    "images", [torch.zeros(3, 3, 8), torch.zeros(3, 1, 8, 8), torch.zeros(3, 3, 8, 8).byte(), torch.zeros(3, 3, 0, 8)]
)
def test_wrong_images_are_rejected(reward: Any, images: torch.Tensor) -> None:
    with pytest.raises(RewardError, match=r"'clipscore': expected images \(N, 3, H, W\)"):
        reward(images, torch.zeros(3), reward.encode(PROMPTS))


def test_wrong_number_of_prompts_is_rejected(reward: Any) -> None:
    with pytest.raises(RewardError, match="got 2 images and 3 prompts"):
        reward(tiny.images(2), torch.zeros(2), reward.encode(PROMPTS))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(WeightError, match="'no/such-clip'.*`hf download no/such-clip`"):
        load("clipscore:no/such-clip")
    with pytest.raises(WeightError, match="`hf download no/such-clip --revision abc`"):
        load("clipscore:no/such-clip@abc")
    with pytest.raises(WeightError, match="expected a folder that save_pretrained wrote"):
        load(f"clipscore:{tmp_path}")


def test_a_pickle_is_not_read(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        if file.suffix != ".safetensors":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save(load_file(folder / "model.safetensors"), tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match="safetensors"):
        load(f"clipscore:{tmp_path}")


def test_half_a_checkpoint_is_not_filled_at_random(tmp_path: Path, folder: Path) -> None:
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    weights = load_file(folder / "model.safetensors")
    del weights["visual_projection.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(WeightError, match="no weights for visual_projection.weight"):
        load(f"clipscore:{tmp_path}")


# ---- pixels ----


@pytest.mark.parametrize("size", [(40, 52), (57, 33), (32, 32), (20, 90), (128, 96)], ids=str)
@pytest.mark.parametrize(
    "processor",
    [
        {},
        {"resample": 2},
        {"kind": "blip"},
        {"size": {"height": 24, "width": 48}, "crop_size": {"height": 20, "width": 30}},
        {"do_center_crop": False, "size": {"shortest_edge": 37}},
        {"do_normalize": False},
    ],
    ids=["clip", "bilinear", "blip", "exact", "no crop", "plain"],
)
def test_pixels_are_the_processors(processor: dict[str, Any], size: tuple[int, int]) -> None:
    """Within 2 steps of 8 bits, 2/255 before normalising: Pillow rounds after each of its two passes."""
    own = tiny.image_processor(**processor)
    batch = (tiny.images(2, *size) * 255).round() / 255
    pixels = Pixels(own)
    expected = own(tiny.pictures(batch), return_tensors="pt")["pixel_values"]
    found = pixels(batch)
    assert found.shape == expected.shape
    assert float(((found - expected) * pixels.std).abs().max()) <= 2 / 255
    assert float(((found - expected) * pixels.std).abs().mean()) <= 0.5 / 255


def test_pixels_clamp_what_the_filter_overshoots() -> None:
    image = torch.zeros(1, 3, 40, 40)
    image[..., 20:] = 1.0
    found = Pixels(tiny.image_processor(do_normalize=False))(image)
    assert float(found.min()) == 0 and float(found.max()) == 1


def test_a_processor_that_does_something_else_is_refused() -> None:
    with pytest.raises(RewardError, match="expected an image processor that resizes"):
        Pixels(tiny.image_processor(resample=1))
    with pytest.raises(RewardError, match="rescale_factor 1.0"):
        Pixels(tiny.image_processor(do_rescale=False))
