"""HunyuanVideo, text to video: embedded guidance, and true classifier-free guidance in two passes (`true_cfg`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import EmbeddedGuidance
from flowfast.models.diffusers.video import VideoFlow
from flowfast.types import Conditions


class HunyuanVideoFlow(EmbeddedGuidance, VideoFlow):
    """Latents are (C, frames, rows, columns). distilled_guidance: an input of the model; true_cfg: two passes.

    max_sequence_length is of the prompt alone; the pipeline's template comes before it and is cut off again.
    """

    pipelines = ("HunyuanVideoPipeline",)

    def latent_shape(self) -> tuple[int, ...]:
        config = self.transformer.config
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        return config.in_channels, *self.latent_grid(time, space, config.patch_size)

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        return {"sigmas": np.linspace(1.0, 0.0, steps + 1)[:-1]}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, pooled, mask = self.pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        return self.conditions(text, pooled, mask)

    def conditions(
        self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, prompt_attention_mask: Tensor
    ) -> Conditions:
        return {"text": prompt_embeds, "pooled": pooled_prompt_embeds, "mask": prompt_attention_mask}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=(1000 * t).to(dtype),  # rounded as the pipeline rounds, whose latents have this type
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_attention_mask=cond["mask"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            guidance=1000.0 * torch.full_like(t, self.distilled_guidance, dtype=dtype),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        return self.to_videos(x0.to(self.pipe.vae.dtype) / self.pipe.vae.config.scaling_factor)
