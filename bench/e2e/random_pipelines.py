"""Pipelines of diffusers with random weights, made on the spot: transformers of some 20 million weights, text encoders
and autoencoders that are small beside them. `quick`: all of it as small as it gets."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

VOCABULARY = 260
TOKENS = 64
"""Of a prompt, padding included, as the T5 encoder and so the transformer get it."""
WIDTH = 64
"""Of the text encoders."""


def tokenizer(length: int) -> PreTrainedTokenizerFast:
    """A token a byte, an end, padding on the right."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {"<pad>": 0, "</s>": 1, "<unk>": 2} | {char: 3 + i for i, char in enumerate(alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def clip(kind: type[CLIPTextModel] | type[CLIPTextModelWithProjection]) -> Any:
    return kind(
        CLIPTextConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=2 * WIDTH, projection_dim=WIDTH,
            num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=77, bos_token_id=1, eos_token_id=1,
            pad_token_id=0,
        )
    ).eval()  # fmt: skip


def t5(width: int) -> T5EncoderModel:
    config = T5Config(
        vocab_size=VOCABULARY, d_model=width, d_kv=16, d_ff=2 * width, num_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=1, decoder_start_token_id=0,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(quick: bool) -> Any:
    """Pictures eight times as large as latents of 16 channels, as those of FLUX.1 and SD3 (quick: twice)."""
    from diffusers import AutoencoderKL

    channels = (4, 4) if quick else (8, 8, 16, 16)
    return AutoencoderKL(
        sample_size=128, in_channels=3, out_channels=3, block_out_channels=channels, layers_per_block=1,
        latent_channels=16, norm_num_groups=1, use_quant_conv=False, use_post_quant_conv=False,
        down_block_types=("DownEncoderBlock2D",) * len(channels), up_block_types=("UpDecoderBlock2D",) * len(channels),
        scaling_factor=1.5, shift_factor=0.06,
    ).eval()  # fmt: skip


def redrawn(module: torch.nn.Module) -> torch.nn.Module:
    """All its weights anew, so that no part of it is switched off by an initialisation with zeros."""
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[-1] ** -0.5 if weight.dim() > 1 else 0.2)
    return module.eval()


def flux(quick: bool = False) -> Any:
    """As FLUX.1-dev: guidance is an input of the model, one pass."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    layers, single, heads = (1, 1, 1) if quick else (4, 10, 4)
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=layers, num_single_layers=single, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(16, 24, 24),
        guidance_embeds=True,
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), vae=autoencoder(quick),
        text_encoder=clip(CLIPTextModel), tokenizer=tokenizer(77), text_encoder_2=t5(WIDTH),
        tokenizer_2=tokenizer(TOKENS), transformer=redrawn(transformer),
    )  # fmt: skip


def sd3(quick: bool = False) -> Any:
    """As Stable Diffusion 3: guidance in two passes where it is above 1."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    layers, heads = (1, 1) if quick else (8, 4)
    transformer = SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=layers, attention_head_dim=64,
        num_attention_heads=heads, joint_attention_dim=2 * WIDTH, caption_projection_dim=64 * heads,
        pooled_projection_dim=2 * WIDTH, pos_embed_max_size=16, qk_norm="rms_norm",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=autoencoder(quick),
        text_encoder=clip(CLIPTextModelWithProjection), tokenizer=tokenizer(77),
        text_encoder_2=clip(CLIPTextModelWithProjection), tokenizer_2=tokenizer(77),
        text_encoder_3=t5(2 * WIDTH), tokenizer_3=tokenizer(TOKENS), transformer=redrawn(transformer),
    )  # fmt: skip
