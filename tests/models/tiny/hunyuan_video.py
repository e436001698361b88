from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case

TOKENS = 520  # the rest of the pipeline's template, in bytes, and a prompt


def hunyuan_video() -> Any:
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    parts.seeded()
    transformer = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=12, num_layers=1, num_single_layers=1,
        num_refiner_layers=1, patch_size=1, patch_size_t=1, text_embed_dim=32, pooled_projection_dim=32,
        rope_axes_dim=(4, 4, 4),
    ).eval()  # fmt: skip
    vae = AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
    ).eval()  # fmt: skip
    return HunyuanVideoPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), vae=vae, text_encoder=parts.llama(),
        tokenizer=parts.tokenizer(1024), text_encoder_2=parts.clip(), tokenizer_2=parts.tokenizer(77),
        transformer=parts.spread(transformer),
    )  # fmt: skip


SIZE = {"height": 16, "width": 32}
SHARED = {"max_sequence_length": TOKENS}

CASES = {
    "hunyuan-video": Case(
        hunyuan_video,
        options={"frames": 5, "distilled_guidance": 4.0, **SHARED},
        call={"num_frames": 5, "guidance_scale": 4.0, **SHARED},
        size=SIZE,
    ),
    "hunyuan-video-true-cfg": Case(
        hunyuan_video,
        options={"frames": 5, "distilled_guidance": 1.5, "true_cfg": 3.0, **SHARED},
        call={
            "num_frames": 5, "guidance_scale": 1.5, "true_cfg_scale": 3.0, "negative_prompt": "blurry", **SHARED,
        },
        negative="blurry",
        size=SIZE,
    ),
}  # fmt: skip
