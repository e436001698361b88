"""Prompts that were encoded elsewhere, as a pipeline's own call takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from flowfast.errors import PromptError
from flowfast.types import Conditions


def conditions_of_embeds(conditions: Callable[..., Conditions], text: str, embeds: Mapping[str, Any]) -> Conditions:
    """Conditions (1, ...) of a prompt that was encoded elsewhere, made by `conditions` of its family. Raises
    PromptError."""
    known = arguments_of(conditions)
    names = list(embeds) if isinstance(embeds, Mapping) else [type(embeds).__name__]
    if not {name for name, needed in known.items() if needed} <= set(names) <= set(known):
        negative = any(name.startswith("negative_") for name in names)
        hint = '; a negative prompt is a text of its own here, "" by default' if negative else ""
        raise PromptError(
            f"embeds of the prompt {text!r}: expected {', '.join(known)} for this model, got {', '.join(names)}{hint}"
        )
    given: dict[str, Tensor] = {}
    for name, value in embeds.items():
        if value is None and not known[name]:
            continue
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Tensor):
            value = value[0][None]  # as Z-Image's pipeline takes them
        came = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
        if not isinstance(value, Tensor) or value.shape[:1] != (1,):
            raise PromptError(
                f"embeds of the prompt {text!r}: expected {name} as the pipeline takes it, with one row, got {came}"
            )
        mask = name.endswith("_mask")
        dims = 2 if mask or name.startswith("pooled_") else 3
        if value.dim() != dims or not (mask or value.is_floating_point()):
            kind = "" if mask else ", floating point"
            raise PromptError(
                f"embeds of the prompt {text!r}: expected {name} with {dims} dimensions{kind}, got {came} {value.dtype}"
            )
        given[name] = value
    tokens = given["prompt_embeds"]
    for name, value in given.items():  # AuraFlow's mask is of channels
        if name.endswith("_mask") and value.shape[1] not in (tokens.shape[1], tokens[0].numel()):
            raise PromptError(
                f"embeds of the prompt {text!r}: expected {name} of the tokens of prompt_embeds "
                f"{tuple(tokens.shape)}, got {tuple(value.shape)}"
            )
    return conditions(**given)


def arguments_of(conditions: Callable[..., Conditions]) -> dict[str, bool]:
    """What the pipeline's call takes for an encoded prompt, and whether it must be given."""
    parameters = inspect.signature(conditions).parameters
    return {name: parameter.default is parameter.empty for name, parameter in parameters.items()}
