"""Versions that a result depends on."""

from __future__ import annotations

import torch

__version__ = "0.1.0"


def versions() -> dict[str, str]:
    """flowfast, its noise stream, torch, threads and the backend of the step: with these equal, a result is
    bit-identical."""
    from flowfast import ops
    from flowfast.ops import noise

    return {
        "flowfast": __version__,
        "noise_stream": str(noise.STREAM_VERSION),
        "torch": torch.__version__,
        "threads": str(torch.get_num_threads()),
        "backend": ops.live()["branch_step"][0],
    }
