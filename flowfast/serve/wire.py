"""What goes through the pipe to an engine's process: tensors as bytes, and errors that both ends know."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowfast import errors
from flowfast.errors import FlowfastError


@dataclass(frozen=True)
class Packed:
    """A tensor of the CPU."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes


def packed(value: Any) -> Any:
    """A message, an event or what is in it. PyTorch would put each tensor into shared memory, which outlives a process
    that is killed."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return Packed(str(value.dtype).removeprefix("torch."), tuple(value.shape), data)
    if isinstance(value, FlowfastError):
        return known(value)
    return mapped(value, packed)


def unpacked(value: Any) -> Any:
    """The same, back again."""
    if isinstance(value, Packed):
        dtype = getattr(torch, value.dtype)
        if not value.data:
            return torch.empty(value.shape, dtype=dtype)
        return torch.frombuffer(bytearray(value.data), dtype=dtype).view(value.shape)
    return mapped(value, unpacked)


def mapped(value: Any, of: Callable[[Any], Any]) -> Any:
    """`of` all that a tuple or a dataclass holds; anything else as it is."""
    if type(value) is tuple:
        return tuple(map(of, value))
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: of(getattr(value, field.name)) for field in fields(value)})
    return value


def known(error: FlowfastError) -> FlowfastError:
    """The nearest class of flowfast/errors.py, with the same text."""
    name = next(kind.__name__ for kind in type(error).__mro__ if kind.__module__ == errors.__name__)
    found: FlowfastError = getattr(errors, name)(str(error))
    found.__dict__.update(vars(error))
    return found
