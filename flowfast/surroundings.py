"""What a host program may have set, and a search must not depend on: it gives the same bits inside
`torch.inference_mode` or `torch.autocast`, and with modules that were left in training mode, as without. A default
dtype or device needs little here, for flowfast's own tensors name theirs.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

DEEPEST, MOST_MEMBERS = 4, 64
"""How far modules are looked for behind functions, attributes and lists."""


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
    """The modules of a model or reward: itself, or what it holds, and what its functions and methods stand on."""
    found, seen, waiting = list[nn.Module](), set[int](), [(part, 0)]
    while waiting:
        each, depth = waiting.pop(0)
        if id(each) in seen or depth > DEEPEST:
            continue
        seen.add(id(each))
        if isinstance(each, nn.Module):
            found.append(each)
        else:
            waiting += [(held, depth + 1) for held in _held(each)]
    return found


def _held(each: Any) -> list[Any]:
    if isinstance(each, functools.partial):
        return [each.func, *each.args, *each.keywords.values()]
    if inspect.ismethod(each):
        return [each.__self__]
    if inspect.isfunction(each):
        cells = [cell for cell in each.__closure__ or () if cell != types.CellType()]  # an empty one holds nothing yet
        names = [name for name in each.__code__.co_names if name in each.__globals__]
        return [cell.cell_contents for cell in cells] + [each.__globals__[name] for name in names]
    if isinstance(each, list | tuple):
        return list(each[:MOST_MEMBERS])
    if inspect.ismodule(each) or inspect.isclass(each):
        return []
    return list(getattr(each, "__dict__", {}).values())
