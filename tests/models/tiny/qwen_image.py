from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def qwen_image() -> Any:
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    parts.seeded()
    transformer = QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, axes_dims_rope=(8, 4, 4),
    ).eval()  # fmt: skip
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2], num_res_blocks=1, temperal_downsample=[True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[1.5, 2.0, 0.7, 1.0],
    ).eval()  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=parts.qwen2_5_vl(), tokenizer=parts.tokenizer(2048),
        transformer=parts.spread(transformer),
    )  # fmt: skip


CASES = {
    # Two passes are the search's own: the pipeline rescales what it guides.
    "qwen-image": Case(
        qwen_image,
        options={"guidance": 1.0, "max_sequence_length": 256},
        call={"max_sequence_length": 256},
    ),
}
