"""Compressibility: how small an image gets as a JPEG. The reward of DDPO (arXiv 2305.13301), its unit and quality."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.rewards.host import CallableReward
from flowfast.rewards.pixels import to_pixels

ONE_LINE = "minus the size of the image as a JPEG of quality 95, in kB; ignores the prompt"
QUALITY = 95


def compressibility(images: Tensor, prompts: Sequence[str]) -> list[float]:
    """-(bytes of the JPEG) / 1000 of images (N, 3, H, W) in [0, 1]; for large files, weigh it by -1."""
    return [-_jpeg_bytes(image) / 1000 for image in to_pixels(images)]


def load(argument: str | None = None) -> CallableReward:
    if argument is not None:
        raise OptionError(f"reward compressibility takes no argument, got {argument!r}; write compressibility")
    return CallableReward(compressibility, range=(-math.inf, 0.0))


def _jpeg_bytes(image: Tensor) -> int:
    file = io.BytesIO()
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=QUALITY)
    return file.tell()
