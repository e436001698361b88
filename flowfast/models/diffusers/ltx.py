"""LTX-Video, text to video: packed latents, classifier-free guidance in two passes."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.models.diffusers.base import resolution_shift
from flowfast.models.diffusers.video import VideoFlow
from flowfast.types import Conditions


class LTXFlow(VideoFlow):
    """Latents are packed, (tokens, C).

    Args:
        frame_rate: frames a second that the model makes the video for.
        decode_timestep, decode_noise_scale: for autoencoders with a time (0.9.1 on): how far the last step is left to
            them. Their noise is the same for every video, so that a reward sees what was found. (Those of 0.9.1 draw
            more noise inside from PyTorch's own generator.)
    """

    pipelines = ("LTXPipeline",)

    def __init__(
        self,
        pipe: Any,
        *,
        frame_rate: float = 25,
        decode_timestep: float = 0.0,
        decode_noise_scale: float | None = None,
        **options: Any,
    ):
        self.frame_rate, self.decode_timestep = frame_rate, decode_timestep
        self.decode_noise_scale = decode_timestep if decode_noise_scale is None else decode_noise_scale
        super().__init__(pipe, **options)

    @property
    def fps(self) -> float:
        return self.frame_rate

    def latent_shape(self) -> tuple[int, ...]:
        frames, rows, columns = self.grid()
        return frames * rows * columns, self.transformer.config.in_channels

    def grid(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        pipe = self.pipe
        time, space = pipe.vae_temporal_compression_ratio, pipe.vae_spatial_compression_ratio
        return self.latent_grid(time, space, pipe.transformer_spatial_patch_size)

    def two_pass_guidance(self) -> float:
        return max(1.0, float(self.settings["guidance_scale"]))  # up to 1 the pipeline runs one pass

    def sampler_arguments(self, steps: int) -> dict[str, Any]:
        mu = resolution_shift(self.pipe.scheduler.config, self.shape[0])
        return {"sigmas": np.linspace(1.0, 1 / steps, steps), "mu": mu}

    @torch.no_grad()
    def encode_texts(self, texts: list[str], device: torch.device) -> Conditions:
        length = self.settings["max_sequence_length"]
        text, mask, _, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, device=device, max_sequence_length=length
        )
        return self.conditions(text, mask)

    def conditions(self, prompt_embeds: Tensor, prompt_attention_mask: Tensor) -> Conditions:
        return {"text": prompt_embeds, "mask": prompt_attention_mask}

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        dtype = self.dtype
        (frames, rows, columns), space = self.grid(), self.pipe.vae_spatial_compression_ratio
        answer = self.transformer(
            hidden_states=x_t.to(dtype),
            encoder_hidden_states=cond["text"].to(dtype),
            timestep=t * self.pipe.scheduler.config.num_train_timesteps,
            encoder_attention_mask=cond["mask"],
            num_frames=frames,
            height=rows,
            width=columns,
            rope_interpolation_scale=(self.pipe.vae_temporal_compression_ratio / self.frame_rate, space, space),
            return_dict=False,
        )[0]
        return answer.to(x_t.dtype)

    def decode(self, x0: Tensor) -> Tensor:
        pipe, vae = self.pipe, self.pipe.vae
        latents = pipe._unpack_latents(
            x0, *self.grid(), pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size
        )
        latents = pipe._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
        if not vae.config.timestep_conditioning:
            return self.to_videos(latents)

        def make() -> Tensor:
            generator = torch.Generator().manual_seed(0)
            return torch.randn(latents.shape[1:], generator=generator, dtype=torch.float32, device="cpu").to(latents)

        noise = self.kept("noise", (latents.shape[1:], latents.device, latents.dtype), make)
        latents = (1 - self.decode_noise_scale) * latents + self.decode_noise_scale * noise
        time = torch.full((len(x0),), self.decode_timestep, device=x0.device, dtype=vae.dtype)
        return self.to_videos(latents, time)
