from __future__ import annotations

from typing import Any

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def transformer(seed: int = 1) -> Any:
    from diffusers import WanTransformer3DModel

    parts.seeded(seed)
    return parts.spread(
        WanTransformer3DModel(
            patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
            text_dim=32, freq_dim=32, ffn_dim=32, num_layers=2, cross_attn_norm=True, rope_max_seq_len=32,
        ).eval()
    )  # fmt: skip


def autoencoder() -> Any:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
        latents_mean=[-0.7, 0.1, 0.4, -0.2], latents_std=[2.8, 1.4, 2.3, 0.6],
    ).eval()  # fmt: skip


def wan(boundary: float | None = None) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline

    parts.seeded()
    second = None
    if boundary is not None:
        second = transformer()
        for weight in second.parameters():
            weight.data.mul_(0.7)
    return WanPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(), text_encoder=parts.umt5(),
        tokenizer=parts.tokenizer(48), transformer=transformer(), transformer_2=second, boundary_ratio=boundary,
    )  # fmt: skip


SIZE = {"height": 16, "width": 32}

CASES = {
    "wan": Case(
        wan,
        options={"frames": 5, "guidance": 3.0, "max_sequence_length": 48},
        call={"num_frames": 5, "guidance_scale": 3.0, "max_sequence_length": 48, "negative_prompt": "blurry"},
        negative="blurry",
        size=SIZE,
    ),
    "wan-2.2": Case(  # at shift 3 and 4 steps the sampler stands at 1, 0.86, 0.6, 0.01: two on each side
        lambda: wan(boundary=0.8),
        options={"frames": 5, "guidance": 1.0, "max_sequence_length": 48},
        call={"num_frames": 5, "guidance_scale": 1.0, "max_sequence_length": 48},
        size=SIZE,
    ),
}
