"""Tiny random checkpoints for the rewards on transformers, saved as hub repositories are; nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import parts

SIDE = 32
VISION = {
    "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": SIDE,
    "patch_size": 8, "projection_dim": 16,
}  # fmt: skip
TEXT = {
    "vocab_size": parts.VOCABULARY, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 77, "bos_token_id": parts.END, "eos_token_id": parts.END,
    "pad_token_id": parts.PAD, "projection_dim": 16,
}  # fmt: skip


def image_processor(side: int = SIDE, kind: str = "clip", **more: Any) -> Any:
    """The version on Pillow: the other needs torchvision."""
    if kind == "blip":
        from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

        return BlipImageProcessorPil(size={"height": side, "width": side}, **more)
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(
        **({"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}} | more)
    )


def save_clip(folder: Path, seed: int = 0, processor: bool = True) -> Path:
    """A CLIPModel with tokenizer and image processor."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(seed)
    clip = CLIPModel(CLIPConfig(text_config=TEXT, vision_config=VISION, projection_dim=16)).eval()
    parts.spread(clip)
    with torch.no_grad():
        clip.logit_scale.fill_(3.0)
    clip.save_pretrained(folder)
    if processor:
        parts.tokenizer(77).save_pretrained(folder)
        image_processor().save_pretrained(folder)
    return folder


def images(count: int, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    """Smooth pictures (count, 3, height, width) in [0, 1]: noise would be mostly what a filter cuts off."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 7, generator=generator)
    return torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").clamp(0.02, 0.98)


def pictures(batch: Tensor) -> list[Any]:
    """As a processor wants them: PIL images of 8 bits."""
    from PIL import Image

    return [Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy()) for image in batch]


def same_alone_and_in_a_batch(reward: Any, batch: Tensor, prompts: list[str]) -> None:
    t = torch.zeros(len(prompts))
    together = reward(batch, t, reward.encode(prompts))
    assert together.shape == (len(prompts),) and together.dtype is torch.float32
    for i, prompt in enumerate(prompts):
        alone = reward(batch[i : i + 1], t[:1], reward.encode([prompt]))
        torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-5, atol=1e-5)
    assert float(together.std()) > 1e-3 * float(together.abs().mean()), "the tiny model says nothing: an empty test"


def gradient_is_finite_differences(
    reward: Any, batch: Tensor, prompts: list[str], step: float = 1e-6, rtol: float = 1e-4
) -> None:
    """Along a random direction, in float64, so that the differences tell the truth."""
    reward.double()
    cond = {key: x.double() if x.is_floating_point() else x for key, x in reward.encode(prompts).items()}
    float32 = Tensor.float
    try:
        Tensor.float = Tensor.double  # type: ignore[method-assign,assignment]
        x, t = batch.double().requires_grad_(), torch.zeros(len(prompts))
        direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(5)).double()
        (gradient,) = torch.autograd.grad(reward(x, t, cond).sum(), x)
        with torch.no_grad():
            slope = (reward(x + step * direction, t, cond) - reward(x - step * direction, t, cond)) / (2 * step)
    finally:
        Tensor.float = float32  # type: ignore[method-assign]
        reward.float()
    assert float(gradient.abs().max()) > 1e-6
    torch.testing.assert_close((gradient * direction).flatten(1).sum(1), slope.double(), rtol=rtol, atol=1e-7)


def reads_no_values(reward: Any, batch: Tensor, prompts: list[str]) -> None:
    """A round's call on the device `meta`, where a tensor has no values: who reads one, or mixes in one of the CPU,
    raises."""
    cond = {key: value.to("meta") for key, value in reward.encode(prompts).items()}
    score = reward.to("meta")(batch.to("meta"), torch.zeros(len(prompts), device="meta"), cond)
    assert score.shape == (len(prompts),) and score.device.type == "meta"
