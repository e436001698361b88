"""Wan 2.1 and 2.2, text to video: classifier-free guidance in two passes; 2.2 has a transformer for low noise."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowfast.models.diffusers.video import VideoFlow
from flowfast.types import Conditions


class WanFlow(VideoFlow):
    """Latents are (C, frames, rows, columns). Below t = boundary_ratio Wan 2.2 changes to its second transformer: each
    row of a batch takes its own. Both have one guidance (the pipeline's guidance_scale_2 is left out).

    For that every call waits once for the times of its rows, and rounds of Wan 2.2 do not run from CUDA graphs (those
    of 2.1 do). A batch with rows on both sides runs through both transformers whole: what a row gets does not depend on
    how many rows go with it, and a search with chains on both sides pays twice for such a batch.
    """

    pipelines = ("WanPipeline",)

    @property
    def boundary(self) -> float | None:
        """The time below which the second transformer answers; None: there is one."""
        return self.pipe.config.boundary_ratio

    @property
    def needed(self) -> tuple[str, ...]:
        return super().needed if self.boundary is None else (*super().needed, "transformer_2")

    @property
    def waits_because(self) -> str:
        two = "Wan 2.2 has two transformers, and the host must read which of them a batch needs"
        return "" if self.boundary is None else two

    def latent_shape(self) -> tuple[int, ...]:
        config = self.transformer.config
        time, space = self.pipe.vae_scale_factor_temporal, self.pipe.vae_scale_factor_spatial
        return config.in_channels, *self.latent_grid(time, space, config.patch_size[1])

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))  # up to 1 the pipeline runs one pass

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device, max_sequence_length=length
        )
        return self.conditions(text)

    def conditions(self, prompt_embeds: Tensor) -> Conditions:
        return {"text": prompt_embeds}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        time = t * self.pipe.scheduler.config.num_train_timesteps
        if self.boundary is None:
            return self._answer(self.transformer, x_t, time, cond["text"])
        early = time >= self.boundary * self.pipe.scheduler.config.num_train_timesteps
        count = int(early.sum())
        first = self._answer(self.transformer, x_t, time, cond["text"]) if count else x_t
        second = self._answer(self.pipe.transformer_2, x_t, time, cond["text"]) if count < len(x_t) else x_t
        return torch.where(early.view(-1, *[1] * (x_t.dim() - 1)), first, second)

    def _answer(self, model: Any, x_t: Tensor, time: Tensor, text: Tensor) -> Tensor:
        dtype = self.dtype
        answer = model(
            hidden_states=x_t.to(dtype),
            timestep=time,
            encoder_hidden_states=text.to(dtype),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        mean, std = self.latent_scale(x0, self.pipe.vae.dtype)
        return self.to_videos(x0.to(self.pipe.vae.dtype) / (1.0 / std) + mean)
