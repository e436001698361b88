"""Tensors on their way to the host: one asynchronous copy through pinned memory, read when it has come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

ALIGNMENT = 16  # bytes: every dtype may be viewed there


class Transfer(NamedTuple):
    """Tensors on the host, complete once the event has passed; event None: they are."""

    tensors: list[Tensor]
    event: Any

    def ready(self) -> bool:
        return self.event is None or bool(self.event.query())

    def read(self) -> list[Tensor]:
        """Waits until they are there."""
        if self.event is not None:
            self.event.synchronize()
        return self.tensors


@dataclass
class _Route:
    """Buffers of one layout: packed on the device, and a ring of the same on the host."""

    packed: Tensor
    views: list[Tensor]
    ring: list[tuple[Tensor, list[Tensor]]]
    sent: int = 0


class Transfers:
    """Sends tensors off. A transfer is overwritten by the one of the same layout `depth` later: read it before.

    On the CPU nothing is copied: a transfer is the tensors themselves, to be read before they change.
    """

    def __init__(self, device: torch.device, depth: int):
        self.device, self.depth = device, depth
        self._routes: dict[tuple[Any, ...], _Route] = {}

    def send(self, tensors: Sequence[Tensor]) -> Transfer:
        if self.device.type == "cpu":
            return Transfer(list(tensors), None)
        layout = tuple((tensor.dtype, *tensor.shape) for tensor in tensors)
        if layout not in self._routes:
            self._routes[layout] = self._route(tensors)
        route = self._routes[layout]
        for view, tensor in zip(route.views, tensors, strict=True):
            view.copy_(tensor)
        host, views = route.ring[route.sent % self.depth]
        route.sent += 1
        host.copy_(route.packed, non_blocking=True)
        event = None
        if self.device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(self.device))
        return Transfer(views, event)

    def _route(self, tensors: Sequence[Tensor]) -> _Route:
        sizes = [-(-tensor.numel() * tensor.element_size() // ALIGNMENT) * ALIGNMENT for tensor in tensors]
        total, pinned = max(sum(sizes), ALIGNMENT), self.device.type == "cuda"
        packed = torch.empty(total, dtype=torch.uint8, device=self.device)
        hosts = [torch.empty(total, dtype=torch.uint8, device="cpu", pin_memory=pinned) for _ in range(self.depth)]
        return _Route(packed, _cut(packed, tensors, sizes), [(host, _cut(host, tensors, sizes)) for host in hosts])


def _cut(flat: Tensor, tensors: Sequence[Tensor], sizes: Sequence[int]) -> list[Tensor]:
    """Views of bytes with the dtypes and shapes of `tensors`."""
    views, start = [], 0
    for tensor, size in zip(tensors, sizes, strict=True):
        used = flat.narrow(0, start, math.prod(tensor.shape) * tensor.element_size())
        views.append(used.view(tensor.dtype).view(tensor.shape))
        start += size
    return views
