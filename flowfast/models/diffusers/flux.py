"""FLUX.1: schnell, dev (embedded guidance) and true classifier-free guidance in two passes (`true_cfg`)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import EmbeddedGuidance, check_size
from flowfast.types import Conditions


class FluxFlow(EmbeddedGuidance):
    """Latents are packed, (tokens, 4 C). distilled_guidance: an input of dev, ignored by schnell; true_cfg: two
    passes."""

    pipelines = ("FluxPipeline",)
    tiny_decoder = "madebyollin/taef1"

    def latent_shape(self) -> tuple[int, ...]:
        side = 2 * self.pipe.vae_scale_factor
        check_size(self.height, self.width, side)
        return (self.height // side) * (self.width // side), self.transformer.config.in_channels

    def default_steps(self) -> int:
        return super().default_steps() if self.takes_guidance() else 4  # schnell

    def takes_guidance(self) -> bool:
        return bool(self.transformer.config.guidance_embeds)

    def image_ids(self, device: torch.device, dtype: torch.dtype) -> Tensor:
        """Places of the tokens (tokens, 3)."""
        rows, columns = (size // (2 * self.pipe.vae_scale_factor) for size in (self.height, self.width))
        key = rows, columns, device, dtype
        return self.kept("image ids", key, lambda: self.pipe._prepare_latent_image_ids(1, *key))

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        config = self.pipe.scheduler.config
        names = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        mu = calculate_shift(self.shape[0], *(config.get(name, default) for name, default in names.items()))
        if config.get("use_flow_sigmas", False):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, pooled, _ = self.pipe.encode_prompt(texts, None, device=device, max_sequence_length=length)
        return self.conditions(text, pooled)

    def conditions(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Conditions:
        return {"text": prompt_embeds, "pooled": pooled_prompt_embeds}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        text = cond["text"].to(dtype)
        guidance = None
        if self.takes_guidance():
            guidance = torch.full_like(t, self.distilled_guidance)
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=(1000 * t).to(dtype) / 1000,  # rounded as the pipeline rounds
            guidance=guidance,
            pooled_projections=cond["pooled"].to(dtype),
            encoder_hidden_states=text,
            txt_ids=text.new_zeros(text.shape[1], 3),
            img_ids=self.image_ids(x_t.device, dtype),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def unpacked(self, x0: Tensor) -> Tensor:
        return self.pipe._unpack_latents(x0, self.height, self.width, self.pipe.vae_scale_factor)

    def decode(self, x0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return self.to_images(self.unpacked(x0) / config.scaling_factor + config.shift_factor)
