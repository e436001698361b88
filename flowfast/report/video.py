"""Videos (F, 3, H, W) in [0, 1] on disk: an .mp4, and a strip of frames wherever a picture is looked at."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor

from flowfast.files import replacing

log = logging.getLogger("flowfast.report")
FRAMES = 6  # of a strip
FPS = 16


def strip(frames: Tensor, most: int = FRAMES) -> Tensor:
    """(3, H, n W): up to `most` frames side by side, from the first to the last."""
    count = min(most, len(frames))
    places = torch.linspace(0, len(frames) - 1, count).round().long()
    return torch.cat(list(frames[places]), dim=-1)


def write_video(path: Path, frames: Tensor, fps: float = FPS) -> bool:
    """H.264. False, with a line in the log, where what it needs is missing."""
    try:
        import imageio.v3 as imageio
        import imageio_ffmpeg  # type: ignore[import-untyped] # noqa: F401
    except ImportError as error:
        log.warning("%s: not written, %s is missing: pip install 'flowfast[diffusers]'", path, error.name)
        return False
    images = (frames.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with replacing(path) as part:
        imageio.imwrite(part, images, plugin="FFMPEG", fps=fps, macro_block_size=2)
    return True
