"""What the video families share: frames, and a size of their own for each side."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowfast.errors import OptionError
from flowfast.models.diffusers.base import DiffusersFlow, check_size


class VideoFlow(DiffusersFlow):
    """A pipeline that makes videos: `decode` gives (N, frames, 3, height, width).

    Args:
        frames: of a video, 1 more than a multiple of the autoencoder's compression in time; default: the pipeline's.
        height, width, options: as for `DiffusersFlow`.
    """

    def __init__(
        self,
        pipe: Any,
        *,
        frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        **options: Any,
    ):
        own = self.call_defaults(pipe)
        self.frames = own["num_frames"] if frames is None else frames
        super().__init__(pipe, height=height or own["height"], width=width or own["width"], **options)

    def latent_grid(self, time: int, space: int, patch: int) -> tuple[int, int, int]:
        """Latent frames, rows and columns. time, space: compression of the autoencoder; patch: of the transformer."""
        check_size(self.height, self.width, space * patch)
        if self.frames < 1 or (self.frames - 1) % time:
            raise OptionError(f"frames must be 1 + a multiple of {time} for this model, got {self.frames}")
        return (self.frames - 1) // time + 1, self.height // space, self.width // space

    def to_videos(self, latents: Tensor, *more: Tensor) -> Tensor:
        """(N, F, 3, H, W) in [0, 1], float32, of latents as the autoencoder takes them, and what else it takes."""
        decoded = self.pipe.vae.decode(latents.to(self.pipe.vae.dtype), *more, return_dict=False)[0]
        return (decoded.transpose(1, 2).float() / 2 + 0.5).clamp(0, 1)
