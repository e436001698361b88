"""Models by name."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowfast import secrets
from flowfast.errors import OptionError
from flowfast.surroundings import own_ground, plain_defaults
from flowfast.types import Flow

MODELS = {"scenes": "the embedded default: 32 x 32 scenes from prompts with counts, colours, kinds and relations"}


@own_ground()
@plain_defaults()
def load(name: str | Path, **options: Any) -> Flow:
    """A flow by name: "scenes", or the id or folder of a diffusers pipeline, for which options go to
    `flowfast.models.diffusers.from_diffusers`. Raises OptionError for an unknown one, WeightError for damaged
    weights."""
    name, options = secrets.opened(str(name)), secrets.opened_options(options)
    if name == "scenes":
        if options:
            raise OptionError(f"model 'scenes' takes no options, got {', '.join(options)}")
        from flowfast.models.scenes import load_scenes

        return load_scenes()
    if "/" in name or Path(name).is_dir():
        from flowfast.models.diffusers import from_diffusers

        return from_diffusers(name, **options)
    raise OptionError(
        f"unknown model {name!r}: choose one of {', '.join(MODELS)}, the id or folder of a diffusers pipeline "
        "(owner/name), or build your own with flowfast.flow_from"
    )


def load_sizes(name: str, sizes: Sequence[str], **options: Any) -> list[Flow]:
    """A flow for each size of its pictures, "512x768" with the width first, on weights that they share. Raises as
    `load`, and OptionError where the model has one size."""
    if name in MODELS:
        raise OptionError(f"model {name!r} draws pictures of one size: leave size out")
    (width, height), *others = [map(int, size.split("x")) for size in sizes]
    first: Any = load(name, height=height, width=width, **options)
    from flowfast.models.diffusers.base import resized

    return [first, *(resized(first, high, wide) for wide, high in others)]
