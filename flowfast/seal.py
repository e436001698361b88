"""The seal of an archive file: its zip's comment, which says what the file is before anything in it is loaded.

    flowfast-archive format_version=1 noise_stream=1 blake2b=<64 digits>

The digest is of all bytes of the file before its 64 digits. Every zip reader, `torch.jit.load` too, takes a comment as
it comes; the C++ loader (csrc/runner/seal.cpp) hands nothing to PyTorch that is not whole. It tells damage, not malice.
"""

from __future__ import annotations

import hashlib
import re

END_OF_DIRECTORY = b"PK\x05\x06"  # the last record of a zip: 22 bytes, the last two the length of the comment
FORMAT_VERSION = 1


def seal(data: bytes, noise_stream: int) -> bytes:
    """A zip file without a comment, sealed."""
    if data[-22:-18] != END_OF_DIRECTORY or data[-2:] != b"\0\0":
        raise ValueError("expected a zip file without a comment")
    words = f"flowfast-archive format_version={FORMAT_VERSION} noise_stream={noise_stream} blake2b=".encode()
    head = data[:-2] + (len(words) + 64).to_bytes(2, "little") + words
    return head + hashlib.blake2b(head, digest_size=32).hexdigest().encode()


def seal_of(data: bytes) -> dict[str, int] | None:
    """format_version and noise_stream of a sealed file that is whole, else None."""
    found = re.search(rb"flowfast-archive format_version=(\d+) noise_stream=(\d+) blake2b=[0-9a-f]{64}\Z", data[-256:])
    if found is None or hashlib.blake2b(data[:-64], digest_size=32).hexdigest().encode() != data[-64:]:
        return None
    return {"format_version": int(found[1]), "noise_stream": int(found[2])}
