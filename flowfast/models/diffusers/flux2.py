"""FLUX.2: dev (embedded guidance) and Klein (distilled, or guidance in two passes)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import DiffusersFlow, EmbeddedGuidance, check_size
from flowfast.types import Conditions


class Flux2Base(DiffusersFlow):
    """What dev and Klein share. Latents are packed and normalised, (tokens, 4 C)."""

    def grid(self) -> tuple[int, int]:
        """Rows and columns of tokens."""
        side = 2 * self.pipe.vae_scale_factor
        check_size(self.height, self.width, side)
        return self.height // side, self.width // side

    def latent_shape(self) -> tuple[int, ...]:
        rows, columns = self.grid()
        return rows * columns, self.transformer.config.in_channels

    def embedded_guidance(self) -> float | None:
        """The scale that the model takes as an input; None: it has no such input."""
        return None

    def places(self, device: torch.device, tokens: int) -> tuple[Tensor, Tensor]:
        """Places of the tokens of a prompt (tokens, 4) and of an image."""

        def make() -> tuple[Tensor, Tensor]:
            text, image = torch.empty(1, tokens, 1), torch.empty(1, 1, *self.grid())
            ids = self.pipe._prepare_text_ids(text)[0], self.pipe._prepare_latent_ids(image)[0]
            return ids[0].to(device), ids[1].to(device)

        return self.kept("places", (device, tokens, *self.grid()), make)

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        mu = compute_empirical_mu(image_seq_len=self.shape[0], num_steps=steps)
        if self.pipe.scheduler.config.get("use_flow_sigmas", False):
            return {"num_inference_steps": steps, "mu": mu}
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, _ = self.pipe.encode_prompt(texts, device=device, max_sequence_length=length)
        return self.conditions(text)

    def conditions(self, prompt_embeds: Tensor) -> Conditions:
        return {"text": prompt_embeds}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        scale = self.embedded_guidance()
        text_ids, image_ids = self.places(x_t.device, cond["text"].shape[1])
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            timestep=(1000 * t).to(dtype) / 1000,  # rounded as the pipeline rounds
            guidance=None if scale is None else torch.full_like(t, scale),
            encoder_hidden_states=cond["text"].to(dtype),
            txt_ids=text_ids,
            img_ids=image_ids,
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        vae = self.pipe.vae
        std = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        latents = x0 * std.to(x0) + vae.bn.running_mean.to(x0)
        return self.to_images(self.pipe._unpatchify_latents(latents.mT.unflatten(2, self.grid())))


class Flux2Flow(EmbeddedGuidance, Flux2Base):
    """distilled_guidance: an input of the model; true_cfg: two passes."""

    pipelines = ("Flux2Pipeline",)

    def embedded_guidance(self) -> float | None:
        return self.distilled_guidance


class Flux2KleinFlow(Flux2Base):
    """guidance: two passes above 1, none where the model is distilled."""

    pipelines = ("Flux2KleinPipeline",)

    def default_steps(self) -> int:
        return 4 if self.pipe.config.is_distilled else super().default_steps()

    def two_pass_guidance(self) -> float:
        return 1.0 if self.pipe.config.is_distilled else max(1.0, float(self.settings["guidance_scale"]))
