"""Pictures as answers have them."""

from __future__ import annotations

import asyncio
import base64
import io

from PIL import Image
from torch import Tensor

from flowfast.rewards.pixels import to_pixels

SMALL = 3 * 64 * 64
"""Numbers of a picture that is encoded where it is: a half of a millisecond, a thread to and fro costs as much."""
LEVEL = 1
"""Of png's compression: a quarter to two thirds of the time of level 6, 10 to 33 % more bytes, the same pixels."""


def encoded(image: Tensor, format: str, compression: int = 100) -> bytes:
    """image (3, H, W) in [0, 1] as a png, jpeg or webp file. compression: 0 .. 100, of jpeg and webp."""
    file = io.BytesIO()
    options = {"compress_level": LEVEL} if format == "png" else {"quality": compression}
    drawn(image).save(file, format, **options)
    return file.getvalue()


def as_text(image: Tensor, format: str, compression: int = 100) -> str:
    """The same in base64."""
    return base64.b64encode(encoded(image, format, compression)).decode()


async def told(image: Tensor, format: str, compression: int = 100) -> str:
    """The same; nobody else waits while a large one is encoded."""
    if image.numel() <= SMALL:
        return as_text(image, format, compression)
    return await asyncio.to_thread(as_text, image, format, compression)


def small(image: Tensor, side: int) -> str:
    """A webp in base64 whose sides are at most so long."""
    file = io.BytesIO()
    picture = drawn(image)
    picture.thumbnail((side, side))
    picture.save(file, "webp", quality=80)
    return base64.b64encode(file.getvalue()).decode()


def drawn(image: Tensor) -> Image.Image:
    return Image.fromarray(to_pixels(image[None])[0].permute(1, 2, 0).contiguous().numpy())


def size_of(image: Tensor) -> str:
    """ "512x768", width first."""
    return f"{image.shape[-1]}x{image.shape[-2]}"
