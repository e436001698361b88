"""The held-out verifier of a model: search never sees it, reports do."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def heldout(model: str, images: Sequence[Tensor], prompts: Sequence[str]) -> list[float] | None:
    """Scores in [0, 1] of images (3, H, W), one a prompt; None where the model has no held-out verifier."""
    if model != "scenes":
        return None
    from flowfast.models.scenes.heldout import heldout_score

    return [float(score) for score in heldout_score(torch.stack(list(images)), list(prompts))]
