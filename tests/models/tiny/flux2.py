from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.models.tiny import parts
from tests.models.tiny.case import Case

TOKENS = 256  # dev's instruction, a token a byte, and a prompt


def transformer(text: int, guidance_embeds: bool) -> Any:
    from diffusers import Flux2Transformer2DModel

    return parts.spread(
        Flux2Transformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=text, timestep_guidance_channels=256,
            axes_dims_rope=(4, 4, 4, 4), guidance_embeds=guidance_embeds,
        ).eval(),
        0.12,
    )  # fmt: skip


def autoencoder() -> Any:
    from diffusers import AutoencoderKLFlux2

    vae = AutoencoderKLFlux2(
        sample_size=32, block_out_channels=(4, 4), layers_per_block=1, latent_channels=4, norm_num_groups=1,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        use_quant_conv=False, use_post_quant_conv=False,
    ).eval()  # fmt: skip
    vae.bn.running_mean.copy_(torch.linspace(-0.4, 0.6, 16))
    vae.bn.running_var.copy_(torch.linspace(0.5, 2.0, 16))
    return vae


def shifted() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)


def flux2() -> Any:
    from diffusers import Flux2Pipeline

    parts.seeded()
    return Flux2Pipeline(
        scheduler=shifted(), vae=autoencoder(), text_encoder=parts.mistral3(layers=30),
        tokenizer=parts.chat_tokenizer(512), transformer=transformer(3 * 32, guidance_embeds=True),
    )  # fmt: skip


def klein(is_distilled: bool = False) -> Any:
    from diffusers import Flux2KleinPipeline

    parts.seeded()
    return Flux2KleinPipeline(
        scheduler=shifted(), vae=autoencoder(), text_encoder=parts.qwen3(layers=27, head=True),
        tokenizer=parts.chat_tokenizer(512), transformer=transformer(3 * 32, guidance_embeds=False),
        is_distilled=is_distilled,
    )  # fmt: skip


def spread_out(latents: Tensor) -> Tensor:
    """Packed latents (N, tokens, C) as the pipelines take them, (N, C, rows, columns)."""
    return latents.mT.unflatten(2, (4, 6))


def packed_again(pipe: Any, latents: Tensor) -> Tensor:
    """Klein hands out latents as the autoencoder takes them."""
    tokens = pipe._patchify_latents(latents).flatten(2).mT
    return (tokens - pipe.vae.bn.running_mean) / (pipe.vae.bn.running_var + pipe.vae.config.batch_norm_eps).sqrt()


SHARED = {"max_sequence_length": TOKENS}

CASES = {
    "flux2-dev": Case(
        flux2,
        options={"distilled_guidance": 2.5, **SHARED},
        call={"guidance_scale": 2.5, **SHARED},
        enter=spread_out,
    ),
    "flux2-klein": Case(
        klein,
        options={"guidance": 3.0, **SHARED},
        call={"guidance_scale": 3.0, **SHARED},
        enter=spread_out,
        leave=packed_again,
    ),
    "flux2-klein-distilled": Case(
        lambda: klein(is_distilled=True),
        options=SHARED,
        call={"guidance_scale": 1.0, **SHARED},
        enter=spread_out,
        leave=packed_again,
    ),
}
