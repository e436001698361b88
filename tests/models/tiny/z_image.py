from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def z_image(dynamic_shift: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    parts.seeded()
    transformer = ZImageTransformer2DModel(
        in_channels=4, dim=32, n_layers=1, n_refiner_layers=1, n_heads=2, n_kv_heads=2, cap_feat_dim=32,
        axes_dims=[4, 6, 6], axes_lens=[256, 32, 32],
    ).eval()  # fmt: skip
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
        vae=parts.autoencoder(4), text_encoder=parts.qwen3(), tokenizer=parts.chat_tokenizer(512),
        transformer=parts.spread(transformer, 0.12),
    )  # fmt: skip


CASES = {
    "z-image": Case(
        z_image,
        options={"guidance": 2.0, "max_sequence_length": 96},
        call={"guidance_scale": 2.0, "max_sequence_length": 96, "negative_prompt": ["a blurry photo of no value"] * 2},
        negative="a blurry photo of no value",
    ),
    "z-image-turbo": Case(
        lambda: z_image(dynamic_shift=True),
        options={"guidance": 0.0, "max_sequence_length": 96},
        call={"guidance_scale": 0.0, "max_sequence_length": 96},
    ),
}
