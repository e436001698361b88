"""Pictures as answers have them."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

from flowfast.rewards.pixels import to_pixels


def encoded(image: Tensor, format: str, compression: int = 100) -> bytes:
    """image (3, H, W) in [0, 1] as a png, jpeg or webp file. compression: 0 .. 100, of jpeg and webp."""
    file = io.BytesIO()
    options = {} if format == "png" else {"quality": compression}
    Image.fromarray(to_pixels(image[None])[0].permute(1, 2, 0).contiguous().numpy()).save(file, format, **options)
    return file.getvalue()


def as_text(image: Tensor, format: str, compression: int = 100) -> str:
    """The same in base64."""
    return base64.b64encode(encoded(image, format, compression)).decode()


def size_of(image: Tensor) -> str:
    """ "512x768", width first."""
    return f"{image.shape[-1]}x{image.shape[-2]}"
