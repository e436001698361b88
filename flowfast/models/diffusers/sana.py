"""SANA: guidance in two passes, prompts under a mask, an autoencoder that shrinks 32-fold."""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, check_size
from flowfast.types import Conditions


class SanaFlow(DiffusersFlow):
    """Latents (C, H / 32, W / 32). guidance: two passes above 1.

    Images have the size that was asked for, as the pipeline's with `use_resolution_binning=False`. Prompts get the
    pipeline's instruction for its text encoder; the empty prompt, its null condition, does not. Any other negative
    prompt is encoded as prompts are.
    """

    pipelines = ("SanaPipeline",)

    def default_size(self) -> int:
        return int(self.transformer.config.sample_size * self.pipe.vae_scale_factor)

    def latent_shape(self) -> tuple[int, ...]:
        scale = self.pipe.vae_scale_factor
        check_size(self.height, self.width, scale * self.transformer.config.patch_size)
        return self.transformer.config.in_channels, self.height // scale, self.width // scale

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        instruction = self.call_defaults(self.pipe)["complex_human_instruction"]
        rows, masks = [], []
        for prompt in texts:
            text, mask, _, _ = self.pipe.encode_prompt(
                prompt, do_classifier_free_guidance=False, device=device,
                max_sequence_length=self.settings["max_sequence_length"],
                complex_human_instruction=instruction if prompt else None,
            )  # fmt: skip
            rows.append(text)
            masks.append(mask)
        return self.conditions(torch.cat(rows), torch.cat(masks))

    def conditions(self, prompt_embeds: Tensor, prompt_attention_mask: Tensor) -> Conditions:
        return {"text": prompt_embeds, "mask": prompt_attention_mask}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        answer = self.transformer(
            x_t.to(dtype),
            encoder_hidden_states=cond["text"].to(dtype),
            encoder_attention_mask=cond["mask"],
            timestep=1000 * t * self.transformer.config.timestep_scale,
            return_dict=False,
        )[0]
        return answer[:, : x_t.shape[1]].to(x_t.dtype)  # what follows, where it is learned, is a variance

    def decode(self, x0: Tensor) -> Tensor:
        return self.to_images(x0 / self.pipe.vae.config.scaling_factor)
