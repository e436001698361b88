"""The options of the families' adapters: their names, and the bounds of those that are numbers."""

from __future__ import annotations

import inspect
from typing import Annotated, Any

from pydantic import BaseModel, ValidationError

from flowfast.bounds import Within, refused
from flowfast.errors import OptionError
from flowfast.flow.grid import MOST_STEPS
from flowfast.models.diffusers.loading import LOADING

PIPELINE_NAMES = {
    "num_inference_steps": ("steps",), "num_frames": ("frames",), "true_cfg_scale": ("true_cfg", "guidance"),
    "guidance_scale": ("distilled_guidance", "guidance"), "prompt_embeds": ("embeds",),
}  # fmt: skip
"""What the calls of pipelines name differently."""


class Numbers(BaseModel):
    """Options that are numbers, of any family."""

    height: Annotated[int | None, Within(1, 32_768)] = None
    width: Annotated[int | None, Within(1, 32_768)] = None
    frames: Annotated[int | None, Within(1, 10_000)] = None
    frame_rate: Annotated[float, Within(0, 1_000, above=True)] = 25
    steps: Annotated[int | None, Within(1, MOST_STEPS)] = None
    max_sequence_length: Annotated[int | None, Within(1, 100_000)] = None
    guidance: Annotated[float | None, Within(0, 1_000)] = None
    distilled_guidance: Annotated[float | None, Within(0, 1_000)] = None
    true_cfg: Annotated[float, Within(0, 1_000)] = 1.0
    decode_timestep: Annotated[float, Within(0, 1)] = 0.0
    decode_noise_scale: Annotated[float | None, Within(0, 1)] = None


def checked_options(family: type, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a family, numbers as they are meant. Raises OptionError for what is none, naming those that are,
    and for numbers out of their bounds."""
    signatures = [inspect.signature(vars(cls)["__init__"]) for cls in family.__mro__[:-1] if "__init__" in vars(cls)]
    known = {
        name for signature in signatures for name, entry in signature.parameters.items()
        if entry.kind is entry.KEYWORD_ONLY
    }  # fmt: skip
    for name in sorted(set(options) - known):
        here = [other for other in PIPELINE_NAMES.get(name, ()) if other in known]
        hint = f"it is called {here[0]} here; " if here else ""
        raise OptionError(
            f"unknown option {name} of {family.__name__}: {hint}choose from {', '.join(sorted(known))}, and for an id "
            f"or folder {', '.join(LOADING)} and its parts"
        )
    try:
        numbers = Numbers(**{name: options[name] for name in options if name in Numbers.model_fields})
    except ValidationError as error:
        raise refused(error) from None
    return options | numbers.model_dump(exclude_unset=True)
