"""What the functions of a model (and a reward's `encode`) answer, in the form that a search takes: checked by type and
shape, never by value, so that a device does not wait. Whatever else comes, or an exception, is one FlowfastError that
names the function.

| of       | a search takes                   | also good                                                              |
|----------|----------------------------------|------------------------------------------------------------------------|
| velocity | (N, *shape) float32              | other float and integer types; an array; a tuple, a dict or an output  |
|          |                                  | object (`.sample`) with one tensor                                     |
| decode   | (N, ...) float32                 | as above; uint8, divided by 255; a list of N images, also PIL's        |
| encode   | a dict of named tensors (N, ...) | another mapping; arrays; {}: nothing is known of a prompt              |

Arrays may have any byte order and strides. A function must leave what it is given as it is, for the search goes on from
it, and must not write two answers into the same memory where it needs both: either is a ModelError.
"""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowfast.errors import FlowfastError, ModelError, OptionError
from flowfast.types import Conditions, FlowDefaults


def asked(what: str, function: Callable[..., Any], *given: Any, kind: type[FlowfastError] = ModelError) -> Any:
    """function(*given). What it raises becomes `kind`, but for flowfast's own errors and the device's lack of memory,
    from which a search goes on with smaller micro-batches."""
    try:
        return function(*given)
    except (FlowfastError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        said = " ".join(str(error).split())[:400]
        raise kind(f"{what} raised {type(error).__name__}: {said}; mend it") from error


def latent_shape(shape: Any) -> tuple[int, ...]:
    """The sizes of one latent, whole numbers of any library. Raises OptionError."""
    try:
        sizes = tuple(operator.index(size) for size in shape)
    except TypeError:
        sizes = ()
    if not sizes or min(sizes) < 1 or any(isinstance(size, bool) for size in shape):
        raise OptionError(f"expected shape to be the positive sizes of one latent, such as (4, 64, 64), got {shape!r}")
    return sizes


def defaults_of(flow: Any) -> FlowDefaults:
    """What a flow tells a search beside its protocol. Raises ModelError where that is no FlowDefaults, or where it
    lies in members of the flow itself, in which nobody looks."""
    found = asked("the model's defaults", getattr, flow, "defaults", None)
    if found is None:
        loose = [each.name for each in fields(FlowDefaults) if getattr(flow, each.name, None) is not None]
        if loose:
            raise ModelError(
                f"the model has {', '.join(loose)} as members of its own, in which nobody looks: give it "
                f"defaults=flowfast.FlowDefaults({', '.join(f'{name}=...' for name in loose)})"
            )
        return FlowDefaults()
    if not isinstance(found, FlowDefaults):
        raise ModelError(
            f"expected defaults of the model to be a flowfast.FlowDefaults, got {type(found).__name__}: see "
            "flowfast.FlowDefaults for what may stand there"
        )
    return found


def velocity_of(answer: Any, x_t: Tensor, what: str = "velocity") -> Tensor:
    """`answer` as a velocity of x_t's shape and type, contiguous. Raises ModelError."""
    u = _tensor(answer, what, x_t.device)
    if u.shape != x_t.shape:
        raise ModelError(
            f"{what} must return the shape of x_t, {tuple(x_t.shape)}, got {tuple(u.shape)}: see flowfast.flow_from"
        )
    return u.to(x_t.dtype).contiguous()


def images_of(answer: Any, x0: Tensor, what: str = "decode") -> Tensor:
    """`answer` as images (N, ...) float32 of latents x0 (N, *shape). Raises ModelError."""
    alone = isinstance(answer, list) and len(answer) == 1 and tuple(getattr(answer[0], "shape", ()))[:1] == (1,)
    if isinstance(answer, list) and len(answer) == len(x0) and not alone:  # alone: a batch of one, not an image
        answer = torch.stack([_picture(each, what, x0.device) for each in answer])
    images = _tensor(answer, what, x0.device)
    if images.dim() < 2 or images.shape[0] != x0.shape[0]:
        raise ModelError(
            f"{what} must return one image a latent, {x0.shape[0]} here, got the shape {tuple(images.shape)}: mend it"
        )
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise ModelError(f"{what} must return images in [0, 1], or uint8, got {images.dtype}: mend it")
    return images.float()


def conditions_of(
    answer: Any, count: int, what: str = "encode", kind: type[FlowfastError] = ModelError, device: Any = None
) -> Conditions:
    """`answer` as conditions of `count` prompts, on one device: `device`, else that of the first. Raises `kind`."""
    if not isinstance(answer, Mapping):
        raise kind(f"{what} must return a dict of named tensors, a row a prompt, got {type(answer).__name__}: mend it")
    found: Conditions = {}
    for name, value in answer.items():
        value = from_array(value) if isinstance(value, np.ndarray) and value.dtype.kind in "fiub" else value
        if not isinstance(name, str) or not isinstance(value, Tensor) or unusual(value):
            came = unusual(value) if isinstance(value, Tensor) else ""
            came = f"{came} tensor" if came else type(value).__name__
            raise kind(f"{what} must return a dict of named tensors, got {came} as {name!r}: mend it")
        if value.dim() < 1 or value.shape[0] != count:
            raise kind(
                f"{what} must return a row a prompt, {count} here, got the shape {tuple(value.shape)} as {name!r}: "
                "mend it"
            )
        device = value.device if device is None else device
        found[name] = value.detach().to(device)
    return found


def from_array(array: np.ndarray) -> Tensor:
    """A tensor with the numbers of an array, on the CPU."""
    kind = np.dtype(np.float64) if array.dtype.itemsize > 8 else array.dtype.newbyteorder("=")
    return torch.from_numpy(np.array(array, kind, order="C"))


def unusual(tensor: Tensor) -> str:
    """What a tensor is that has no numbers in rows: "sparse", "nested", "quantized" or "meta"; "" for all others."""
    if tensor.is_nested:
        return "nested"
    if tensor.layout is not torch.strided:
        return "sparse"
    return "quantized" if tensor.is_quantized else "meta" if tensor.is_meta else ""


def version_of(tensor: Tensor) -> int:
    """How often a tensor's memory was written to in place, of which tensors of inference mode keep no count."""
    return 0 if tensor.is_inference() else tensor._version


def nothing(count: int) -> Conditions:
    """Conditions of prompts of which the model is told nothing."""
    return {"index": torch.zeros(count, 1, dtype=torch.float32, device="cpu")}


class CheckedFlow:
    """A flow whose answers are what a search takes. decoder: the name that its `decode` has in errors."""

    def __init__(self, flow: Any, decoder: str = "decode"):
        self._flow, self._decoder, self._velocity, self._decode = flow, decoder, flow.velocity, flow.decode
        self.keeps_velocity = False  # is a velocity needed beyond the next call?
        self._last: dict[str, tuple[Any, int]] = {}  # the last answer of a function and its version

    def __getattr__(self, name: str) -> Any:
        return getattr(self._flow, name)

    def encode(self, prompts: list[str]) -> Conditions:
        found = conditions_of(asked("the model's encode", self._flow.encode, prompts), len(prompts))
        return found or nothing(len(prompts))

    def velocity(self, x_t: Tensor, t: Tensor, cond: Conditions) -> Tensor:
        answer = self._unharmed("velocity", self._velocity, x_t, t, cond)
        u = velocity_of(answer, x_t)
        return self._alone("velocity", u, x_t, keep=True) if self.keeps_velocity else u

    def decode(self, x0: Tensor) -> Tensor:
        answer = self._unharmed(self._decoder, self._decode, x0)
        return self._alone(self._decoder, images_of(answer, x0, self._decoder), x0)

    def _unharmed(self, what: str, function: Callable[..., Any], given: Tensor, *rest: Any) -> Any:
        """The function's answer. Raises ModelError where it has written into `given`."""
        before = version_of(given)
        answer = asked(f"the model's {what}", function, given, *rest)
        if version_of(given) != before:
            raise ModelError(f"{what} changed the latents that it was given in place: let it work on a copy, x.clone()")
        return answer

    def _alone(self, what: str, answer: Tensor, given: Tensor, keep: bool = False) -> Tensor:
        """The answer. Raises ModelError where it was written over the one before, which is still needed."""
        if _same_memory(answer, given):  # latents as pictures
            return answer
        last, version = self._last.get(what, (lambda: None, 0))
        before = last()
        if before is not None and _same_memory(before, answer) and version_of(before) != version:
            raise ModelError(
                f"{what} writes its answers into the same memory: return a new tensor each time, x.clone()"
            )
        self._last[what] = ((lambda: answer) if keep else weakref.ref(answer), version_of(answer))
        return answer


def _same_memory(one: Tensor, other: Tensor) -> bool:
    """Are they the same tensor, or views of the same?"""
    left, right = (tensor if tensor._base is None else tensor._base for tensor in (one, other))
    return left is right


def _tensor(answer: Any, what: str, device: torch.device) -> Tensor:
    """The one real tensor in an answer, where it belongs."""
    found = answer
    if isinstance(found, Mapping):
        tensors = [value for value in found.values() if isinstance(value, Tensor)]
        found = tensors[0] if len(tensors) == 1 else found.get("sample")
    elif isinstance(found, Sequence) and len(found) == 1:
        found = found[0]
    elif not isinstance(found, Tensor | np.ndarray):
        found = getattr(found, "sample", None)
    if isinstance(found, np.ndarray) and found.dtype.kind in "fiu":
        found = from_array(found)
    if not isinstance(found, Tensor) or found.is_complex() or found.dtype == torch.bool or unusual(found):
        came = f"{unusual(found)} {found.dtype}".strip() if isinstance(found, Tensor) else type(answer).__name__
        size = f" of {len(answer)}" if isinstance(answer, tuple | list | Mapping) else ""
        raise ModelError(f"{what} must return one tensor of real numbers, got {came}{size}: mend it")
    if found.device != device:
        raise ModelError(f"{what} must return a tensor on {device}, where its input was, got one on {found.device}")
    return found


def _picture(each: Any, what: str, device: torch.device) -> Tensor:
    """One image of a list: a tensor or array (3, H, W), or a picture of PIL."""
    if hasattr(each, "convert"):
        return torch.as_tensor(np.array(each.convert("RGB")), device=device).permute(2, 0, 1)
    return _tensor(each, what, device)
