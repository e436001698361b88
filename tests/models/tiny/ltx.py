from __future__ import annotations

from typing import Any

import torch

from tests.models.tiny import parts
from tests.models.tiny.case import Case


def autoencoder(timestep_conditioning: bool) -> Any:
    from diffusers import AutoencoderKLLTXVideo

    vae = AutoencoderKLLTXVideo(
        latent_channels=8, block_out_channels=(8, 8, 8, 8), decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1), decoder_layers_per_block=(1, 1, 1, 1, 1),
        timestep_conditioning=timestep_conditioning,
    ).eval()  # fmt: skip
    vae.latents_mean.copy_(torch.linspace(-0.5, 0.5, 8))
    vae.latents_std.copy_(torch.linspace(0.6, 1.7, 8))
    return vae


def ltx(timestep_conditioning: bool = False) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    parts.seeded()
    transformer = LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, num_attention_heads=2, attention_head_dim=16, cross_attention_dim=32,
        num_layers=2, caption_channels=32,
    ).eval()  # fmt: skip
    return LTXPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True, base_shift=0.95, max_shift=2.05, shift_terminal=0.1
        ),
        vae=autoencoder(timestep_conditioning), text_encoder=parts.t5(), tokenizer=parts.tokenizer(48),
        transformer=parts.spread(transformer),
    )  # fmt: skip


SIZE = {"height": 32, "width": 64}

CASES = {
    "ltx": Case(
        ltx,
        options={"frames": 9, "frame_rate": 24, "guidance": 3.0, "max_sequence_length": 48},
        call={
            "num_frames": 9, "frame_rate": 24, "guidance_scale": 3.0, "max_sequence_length": 48,
            "negative_prompt": "blurry",
        },
        negative="blurry",
        size=SIZE,
    ),
    "ltx-distilled": Case(
        lambda: ltx(timestep_conditioning=True),
        options={"frames": 9, "guidance": 1.0, "max_sequence_length": 48},
        call={"num_frames": 9, "guidance_scale": 1.0, "max_sequence_length": 48},
        size=SIZE,
    ),
}  # fmt: skip
