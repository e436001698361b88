"""Lumina-Image 2.0: time runs from 0 (noise) to 1 and velocities have the other sign; guidance in two passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size, resolution_shift
from flowfast.types import Conditions


class Lumina2Flow(DiffusersFlow):
    """Latents (C, H / 8, W / 8). guidance: two passes above 1, as the pipeline with `cfg_normalization=False`.

    The pipeline's default scales the guided velocity back to the length of the conditional one; the search combines
    the passes itself and does not. The empty prompt is the pipeline's null condition, without its system prompt; any
    other negative prompt gets the system prompt as prompts do. The transformer reads the length of each prompt in every
    call, so rounds do not run from CUDA graphs.
    """

    pipelines = ("Lumina2Pipeline",)
    waits_because = "Lumina 2's transformer takes each prompt at its own length, which the host must read"
    tiny_decoder = "madebyollin/taef1"

    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        check_size(self.height, self.width, 2 * scale)
        return self.transformer.config.in_channels, self.height // scale, self.width // scale

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        # The pipeline shifts by the number of channels, where other families count tokens.
        mu = resolution_shift(self.pipe.scheduler.config, self.shape[0])
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        system = f"{self.pipe.system_prompt} <Prompt Start> "
        text, mask = self.pipe._get_gemma_prompt_embeds(
            [system + prompt if prompt else "" for prompt in texts], device, self.settings["max_sequence_length"]
        )
        return self.conditions(text, mask)

    def conditions(self, prompt_embeds: Tensor, prompt_attention_mask: Tensor) -> Conditions:
        return {"text": prompt_embeds, "mask": prompt_attention_mask}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=1 - t,
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_attention_mask=cond["mask"],
            return_dict=False,
        )[0]
        return -answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return self.to_images(x0 / config.scaling_factor + config.shift_factor)
