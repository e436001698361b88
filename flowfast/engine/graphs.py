"""CUDA graphs: the parts of a round are captured one by one, each once for every number of rows: the model's call with
its posterior mean, decoder and reward, and what regroups chains. So the graphs of many sizes add up, where those of
whole rounds would multiply.

Everything that one part leaves to the next lies in buffers that never move (`Lanes` makes its views once), padding
lanes are masked by the ops, and seeds, transitions and coefficients are read from the device, so a replay works on the
state of its own round. All graphs of an engine share one pool of memory: nothing in it outlives its part but the images
of a round, which are read before the next part runs. What cannot be captured runs eagerly, and the log says why, once.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flowfast.errors import FlowfastError

log = logging.getLogger("flowfast.engine")
MOST_GRAPHS = 32
"""Of one part of a batch: numbers of rows, of which requests at different transitions may mix many."""


class Recorder(Protocol):
    """Turns a function of static tensors into something that can be replayed."""

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        """Records `work` without running it: what it returns (static from now on), and its replay."""


class CudaRecorder:
    """Graphs of one device in one memory pool; they never run at the same time."""

    def __init__(self, device: torch.device):
        self.device, self.pool = device, torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self.device), torch.cuda.graph(graph, pool=self.pool):
            result = work()
        return result, graph.replay


class Graphs:
    """Runs `work` by key: eagerly the first time (that is the warm-up), from a graph afterwards."""

    def __init__(self, recorder: Recorder | None):
        """recorder None: everything runs eagerly."""
        self.recorder, self.eager_because = recorder, dict[Hashable, str]()
        self._warm: set[Hashable] = set()
        self._captured = OrderedDict[Hashable, tuple[Any, Callable[[], None], list[tuple[int, ...]]]]()

    def captures(self, key: Hashable) -> bool:
        """Is there a recorder, and has it not failed at this key?"""
        return self.recorder is not None and key not in self.eager_because

    def run(self, key: Hashable, work: Callable[[], Any], inputs: Sequence[Tensor]) -> Any:
        """What `work` returns; from a replay these are the tensors of its capture, overwritten.

        inputs: all that `work` reads and that the caller may replace. Raises FlowfastError where one has moved since
        the capture: a replay would read the old place.
        """
        if self.recorder is None or key in self.eager_because:
            return work()
        if key not in self._captured:
            if key not in self._warm:
                self._warm.add(key)
                return work()
            try:
                self._captured[key] = (*self.recorder.capture(work), places(inputs))
                if len(self._captured) > MOST_GRAPHS:
                    self._captured.popitem(last=False)  # the one that was not used for longest
            except Exception as error:  # a model may do anything; eager always works
                self.eager_because[key] = f"{type(error).__name__}: {error}"
                log.warning("runs without a CUDA graph, more slowly, because the capture failed: %s", error)
                return work()
        self._captured.move_to_end(key)
        result, replay, captured = self._captured[key]
        if places(inputs) != captured:
            moved = [i for i, (now, then) in enumerate(zip(places(inputs), captured, strict=True)) if now != then]
            raise FlowfastError(f"inputs {moved} of a captured round moved or changed shape: write into them in place")
        replay()
        return result


def places(tensors: Sequence[Tensor]) -> list[tuple[int, ...]]:
    """Address, shape and strides of each tensor."""
    return [(tensor.data_ptr(), *tensor.shape, *tensor.stride()) for tensor in tensors]


def recorder_for(device: torch.device, wanted: bool) -> Recorder | None:
    """A recorder where the device has graphs."""
    return CudaRecorder(device) if wanted and device.type == "cuda" else None
