"""Z-Image: time runs from 0 (noise) to 1 and velocities have the other sign; prompts keep their own lengths."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size, padded, resolution_shift
from flowfast.types import Conditions


class ZImageFlow(DiffusersFlow):
    """Latents (C, H / 8, W / 8). guidance: the pipeline's scale w, two passes above 0.

    The pipeline guides by u + w (u - u_null), which is a scale of 1 + w in u_null + scale (u - u_null): the default of
    5 shows as `flow.guidance == 6`. Z-Image-Turbo is distilled: guidance=0, steps=9.

    The transformer takes each prompt at its own length and builds its positions from it, so every call of it waits for
    these lengths, and rounds do not run from CUDA graphs.
    """

    waits_because = "Z-Image's transformer takes each prompt at its own length, which the host must read"

    pipelines = ("ZImagePipeline",)
    tiny_decoder = "madebyollin/taef1"

    def default_size(self) -> int:
        return 1024

    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        check_size(self.height, self.width, 2 * scale)
        return self.transformer.in_channels, self.height // scale, self.width // scale

    def two_pass_guidance(self) -> float:
        scale = float(self.settings["guidance_scale"])
        return 1 + max(0.0, scale)

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        from diffusers.pipelines.z_image.pipeline_z_image import get_default_z_image_sigmas

        tokens = (self.shape[1] // 2) * (self.shape[2] // 2)
        return {
            "sigmas": get_default_z_image_sigmas(steps), "mu": resolution_shift(self.pipe.scheduler.config, tokens)
        }  # fmt: skip

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        rows, _ = self.pipe.encode_prompt(
            list(texts), device=device, do_classifier_free_guidance=False, max_sequence_length=length
        )
        return self.conditions(rows)

    def conditions(self, prompt_embeds: list[Tensor]) -> Conditions:
        text, mask = padded(prompt_embeds, self.settings["max_sequence_length"])
        return {"text": text, "length": mask.sum(1)}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        text = cond["text"].to(dtype)
        rows = [row[:length] for row, length in zip(text, cond["length"].tolist(), strict=True)]
        images = list(x_t.to(dtype).unsqueeze(2).unbind())  # one frame each
        time = (1000 - 1000 * t) / 1000  # 1 - t, rounded as the pipeline rounds
        answer = self.transformer(images, time, rows, return_dict=False)[0]
        return -torch.stack(list(answer)).squeeze(2).to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        config = self.pipe.vae.config
        return self.to_images(x0 / config.scaling_factor + config.shift_factor)
