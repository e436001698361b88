from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def sd3(dynamic_shift: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    parts.seeded()
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
        pos_embed_max_size=16, qk_norm="rms_norm", dual_attention_layers=(0,),
    ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shift),
        vae=parts.autoencoder(4), text_encoder=parts.clip(projection=True), tokenizer=parts.tokenizer(77),
        text_encoder_2=parts.clip(projection=True), tokenizer_2=parts.tokenizer(77),
        text_encoder_3=parts.t5(64), tokenizer_3=parts.tokenizer(48), transformer=parts.spread(transformer, 0.15),
    )  # fmt: skip


CASES = {
    "sd3": Case(
        sd3,
        options={"guidance": 3.0, "max_sequence_length": 48},
        call={"guidance_scale": 3.0, "max_sequence_length": 48, "negative_prompt": ["blurry"] * 2},
        negative="blurry",
    ),
    "sd3-one-pass": Case(
        lambda: sd3(dynamic_shift=True),
        options={"guidance": 1.0, "max_sequence_length": 48},
        call={"guidance_scale": 1.0, "max_sequence_length": 48},
    ),
}
