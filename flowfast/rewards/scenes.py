"""The verifier of the embedded model `scenes`: does the picture show the objects that the prompt names?"""

from __future__ import annotations

from typing import Any

ONE_LINE = "does the picture show what the prompt says (the verifier of model scenes): log-probability, at most 0"


def load() -> Any:
    """The shipped verifier, an `nn.Module` that takes a time per row. Raises WeightError for damaged weights."""
    from flowfast.models.scenes.weights import load_scene_reward

    return load_scene_reward()
