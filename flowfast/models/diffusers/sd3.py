"""Stable Diffusion 3 and 3.5: guidance in two passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size, resolution_shift
from flowfast.types import Conditions


class StableDiffusion3Flow(DiffusersFlow):
    """Latents (C, H / 8, W / 8). guidance: two passes above 1."""

    pipelines = ("StableDiffusion3Pipeline",)
    tiny_decoder = "madebyollin/taesd3"
    spare = ("text_encoder_3", "tokenizer_3")

    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        check_size(self.height, self.width, scale * self.transformer.config.patch_size)
        return self.transformer.config.in_channels, self.height // scale, self.width // scale

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        config, patch = self.pipe.scheduler.config, self.transformer.config.patch_size
        if not config.get("use_dynamic_shifting"):
            return {"num_inference_steps": steps}
        tokens = (self.shape[1] // patch) * (self.shape[2] // patch)
        return {"num_inference_steps": steps, "mu": resolution_shift(config, tokens, max_shift=1.16)}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        text, _, pooled, _ = self.pipe.encode_prompt(
            texts, None, None, device=device, do_classifier_free_guidance=False,
            max_sequence_length=self.settings["max_sequence_length"],
        )  # fmt: skip
        return self.conditions(text, pooled)

    def conditions(self, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Conditions:
        return {"text": prompt_embeds, "pooled": pooled_prompt_embeds}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=1000 * t,
            encoder_hidden_states=cond["text"].to(dtype),
            pooled_projections=cond["pooled"].to(dtype),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return self.to_images(x0 / config.scaling_factor + config.shift_factor)
