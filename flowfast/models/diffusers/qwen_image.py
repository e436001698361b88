"""Qwen-Image: guidance in two passes, prompts under a mask."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size, padded, resolution_shift
from flowfast.types import Conditions


class QwenImageFlow(DiffusersFlow):
    """Latents are packed, (tokens, 4 C). guidance: two passes above 1; default: the pipeline's `true_cfg_scale`.

    The pipeline guides only where it is given a negative prompt, and scales the guided velocity back to the length of
    the conditional one. The search combines the passes itself and does not: a smaller scale does the same. The
    transformer copies a number from the host in every call, so rounds do not run from CUDA graphs.
    """

    pipelines = ("QwenImagePipeline",)
    waits_because = "Qwen-Image's transformer copies the length of its texts from the host in each call"

    def __init__(self, pipe: Any, *, guidance: float | None = None, **options: Any):
        if guidance is None:
            guidance = self.call_defaults(pipe)["true_cfg_scale"]
        super().__init__(pipe, guidance=guidance, **options)

    def latent_shape(self) -> tuple[int, ...]:
        side = 2 * self.pipe.vae_scale_factor
        check_size(self.height, self.width, side)
        return (self.height // side) * (self.width // side), self.transformer.config.in_channels

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        mu = resolution_shift(self.pipe.scheduler.config, self.shape[0])
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, mask = self.pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        return self.conditions(text, mask)

    def conditions(self, prompt_embeds: Tensor, prompt_embeds_mask: Tensor | None = None) -> Conditions:
        text, mask = prompt_embeds, prompt_embeds_mask
        if mask is None:
            mask = torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        rows = [row[real.bool()] for row, real in zip(text, mask, strict=True)]
        text, mask = padded(rows, self.settings["max_sequence_length"])
        return {"text": text, "mask": mask}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        side = 2 * self.pipe.vae_scale_factor
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=(1000 * t).to(dtype) / 1000,  # rounded as the pipeline rounds
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_hidden_states_mask=cond["mask"],
            img_shapes=[[(1, self.height // side, self.width // side)]] * len(x_t),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        latents = self.pipe._unpack_latents(x0, self.height, self.width, self.pipe.vae_scale_factor)
        mean, std = self.latent_scale(latents, torch.float32)
        return self.to_images(latents * std + mean)[:, :, 0]
