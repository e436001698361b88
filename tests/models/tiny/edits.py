"""Pipelines that go on after their scheduler's step: they put an image or a first frame back. Parts of the tiny
pipelines of their families."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from tests.models.tiny import parts
from tests.models.tiny.flux import flux
from tests.models.tiny.ltx import ltx
from tests.models.tiny.qwen_image import qwen_image
from tests.models.tiny.sd3 import sd3
from tests.models.tiny.wan import wan
from tests.models.tiny.z_image import z_image

FLUX_PARTS = ("scheduler", "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "transformer")


def flux_edit(name: str, **more: Any) -> Any:
    """A pipeline of FLUX's parts by the name of its class."""
    import diffusers

    own = flux().components
    return getattr(diffusers, name)(**{part: own[part] for part in FLUX_PARTS}, **more)


def flux_control_inpaint() -> Any:
    """Its transformer also takes the control image's latents."""
    from diffusers import FluxTransformer2DModel

    pipe = flux_edit("FluxControlInpaintPipeline")
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=32, out_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    ).eval()  # fmt: skip
    pipe.transformer = parts.spread(transformer)
    return pipe


def flux_controlnet_inpaint() -> Any:
    from diffusers import FluxControlNetModel

    parts.seeded(3)
    net = FluxControlNetModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=[4, 4, 8], guidance_embeds=True,
    ).eval()  # fmt: skip
    return flux_edit("FluxControlNetInpaintPipeline", controlnet=net)


def sd3_inpaint() -> Any:
    """Its pipeline wants latents of 16 channels."""
    from diffusers import SD3Transformer2DModel, StableDiffusion3InpaintPipeline

    own = dict(sd3().components)
    own["transformer"] = parts.spread(
        SD3Transformer2DModel(
            sample_size=16, patch_size=2, in_channels=16, out_channels=16, num_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=32, pooled_projection_dim=64,
            pos_embed_max_size=16,
        ).eval(),
        0.15,
    )  # fmt: skip
    return StableDiffusion3InpaintPipeline(**own | {"vae": parts.autoencoder(16)})


def qwen_inpaint() -> Any:
    from diffusers import QwenImageInpaintPipeline

    return QwenImageInpaintPipeline(**qwen_image().components)


def ltx_image_to_video() -> Any:
    from diffusers import LTXImageToVideoPipeline

    return LTXImageToVideoPipeline(**ltx().components)


def wan_image_to_video() -> Any:
    """Wan 2.2 of 5B: a transformer that takes a time for each token."""
    from diffusers import WanImageToVideoPipeline

    own = wan().components
    names = ("scheduler", "vae", "text_encoder", "tokenizer", "transformer")
    return WanImageToVideoPipeline(**{name: own[name] for name in names}, expand_timesteps=True)


def z_image_inpaint() -> Any:
    from diffusers import ZImageInpaintPipeline

    return ZImageInpaintPipeline(**z_image().components)


def picture(height: int, width: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(7).integers(0, 255, (height, width, 3), dtype=np.uint8))


def left_half(height: int, width: int) -> Image.Image:
    """A mask: what is white is drawn anew."""
    mask = np.zeros((height, width), np.uint8)
    mask[:, : width // 2] = 255
    return Image.fromarray(mask)
