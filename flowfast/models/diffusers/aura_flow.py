"""AuraFlow: guidance in two passes; padding of a prompt is zeroed, not masked."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size
from flowfast.types import Conditions


class AuraFlowFlow(DiffusersFlow):
    """Latents (C, H / 8, W / 8). guidance: two passes above 1."""

    pipelines = ("AuraFlowPipeline",)
    tiny_decoder = "madebyollin/taesdxl"

    def default_size(self) -> int:
        return 1024

    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        check_size(self.height, self.width, scale * self.transformer.config.patch_size)
        return self.transformer.config.in_channels, self.height // scale, self.width // scale

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        text, mask, _, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device,
            max_sequence_length=self.settings["max_sequence_length"],
        )  # fmt: skip
        return self.conditions(text, mask)

    def conditions(self, prompt_embeds: Tensor, prompt_attention_mask: Tensor | None = None) -> Conditions:
        return {"text": prompt_embeds}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        answer = self.transformer(
            x_t.to(dtype),
            encoder_hidden_states=cond["text"].to(dtype),
            timestep=t.to(dtype),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae
        if vae.dtype == torch.float16 and vae.config.force_upcast:
            vae.to(torch.float32)
        return self.to_images(x0 / vae.config.scaling_factor)
