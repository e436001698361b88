"""The seal of an archive file: its zip's comment, which says what the file is before anything in it is loaded.

    flowfast-archive format_version=2 noise_stream=1 blake2b=<64 digits>

The digest is of all bytes of the file before its 64 digits. Every zip reader, `torch.jit.load` too, takes a comment as
it comes; the C++ loader (csrc/runner/seal.cpp) hands nothing to PyTorch that is not whole. It tells damage, not malice.
"""

from __future__ import annotations

import hashlib
import io
import re
from typing import BinaryIO

END_OF_DIRECTORY = b"PK\x05\x06"  # the last record of a zip: 22 bytes, the last two the length of the comment
FORMAT_VERSION = 5
DIGITS = 64


def seal(data: bytes, noise_stream: int) -> bytes:
    """A zip file without a comment, sealed."""
    file = io.BytesIO(data)
    seal_file(file, noise_stream)
    return file.getvalue()


def seal_file(file: BinaryIO, noise_stream: int) -> None:
    """Seals a zip file without a comment, opened for reading and writing, where it lies."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 22))
    end = file.read()
    if end[:4] != END_OF_DIRECTORY or end[-2:] != b"\0\0":
        raise ValueError("expected a zip file without a comment")
    words = f"flowfast-archive format_version={FORMAT_VERSION} noise_stream={noise_stream} blake2b=".encode()
    file.seek(size - 2)
    file.write((len(words) + DIGITS).to_bytes(2, "little") + words)
    file.write(digest(file, size + len(words)).encode())


def seal_of(file: BinaryIO) -> dict[str, str] | None:
    """format_version, noise_stream and blake2b of a sealed file that is whole, else None."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - 256))
    words = rb"flowfast-archive format_version=(\d+) noise_stream=(\d+) blake2b=([0-9a-f]{64})\Z"
    found = re.search(words, file.read())
    if found is None or digest(file, size - DIGITS) != found[3].decode():
        return None
    return dict(zip(("format_version", "noise_stream", "blake2b"), map(bytes.decode, found.groups()), strict=True))


def digest(file: BinaryIO, count: int) -> str:
    """BLAKE2b-256 of the first `count` bytes, which leaves the file behind them."""
    hashed = hashlib.blake2b(digest_size=DIGITS // 2)
    file.seek(0)
    while count > 0:
        piece = file.read(min(count, 1 << 20))
        hashed.update(piece)
        count -= len(piece)
    return hashed.hexdigest()
