"""What a host program may have set, and a search must not depend on: it gives the same bits inside
`torch.inference_mode` or `torch.autocast`, and with modules that were left in training mode, as without. A default
dtype or device needs little here, for flowfast's own tensors name theirs.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def own_ground() -> Iterator[None]:
    """Without gradients, inference mode and autocast. A model that wants autocast enters it in its own velocity."""
    with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def evaluating(*parts: Any) -> Iterator[None]:
    """The modules of `parts` (models, rewards) in evaluation mode; as they were afterwards."""
    training = [module for part in parts for root in modules_of(part) for module in root.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def plain_defaults() -> Iterator[None]:
    """float32 on the CPU as defaults while a model or reward of flowfast's own is built. They are all threads', so not
    longer."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        with torch.device("cpu"):
            yield
    finally:
        torch.set_default_dtype(before)


def modules_of(part: Any) -> list[nn.Module]:
    """The modules of a model or reward, itself or what it holds: among its attributes and theirs, behind its methods,
    and where its functions were written."""
    if isinstance(part, nn.Module):
        return [part]
    held = [part, *getattr(part, "__dict__", {}).values()]
    for each in list(held):
        held.append(getattr(each, "__self__", None))
        held += getattr(each, "__dict__", {}).values()
        if inspect.isfunction(each):
            found = inspect.getclosurevars(each)
            held += [*found.nonlocals.values(), *found.globals.values()]
    return list({id(each): each for each in held if isinstance(each, nn.Module)}.values())
