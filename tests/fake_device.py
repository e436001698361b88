"""A device that computes on the CPU and counts what would make the host wait on a real accelerator.

`FakeDevice` is a dispatch mode; a tensor "on the device" is a wrapper with device `privateuseone` around a CPU tensor,
so a copy to the host is a copy (a dispatch mode over plain CPU tensors never sees `.cpu()`). Eager and scripted code go
through the same dispatcher, so both are counted.

| count    | what                                                                                                    |
|----------|---------------------------------------------------------------------------------------------------------|
| waits    | item / bool / int / float of a tensor; blocking copies to the host; ops whose output shape depends on   |
|          | data (nonzero, boolean mask indexing, masked_select, unique, repeat_interleave by a tensor); blocking   |
|          | copies and creations from host memory (CUDA's copy from pageable memory returns when the stream is      |
|          | there)                                                                                                  |
| copies   | copies between host and device with non_blocking=True                                                   |
| launches | every other op that is not a view and not an uninitialised allocation                                   |
"""

from __future__ import annotations

import traceback
from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from flowfast.ops import backend as backends

torch.utils.rename_privateuse1_backend("privateuseone")  # its own name: now autograd takes it for an accelerator
_setup_privateuseone_for_python_backend()
# torch.random.fork_rng, anywhere in this process, now asks this device, too; its numbers are the CPU's.
torch.privateuseone.get_rng_state = lambda device=0: torch.empty(0, dtype=torch.uint8)  # type: ignore[attr-defined]
torch.privateuseone.set_rng_state = lambda state, device=0: None  # type: ignore[attr-defined]
DEVICE = torch.device("privateuseone", 0)
TO_NUMBER = {"_local_scalar_dense", "is_nonzero", "equal"}
UNKNOWN_SHAPE = {"nonzero", "masked_select", "_unique", "_unique2", "unique_dim", "unique_consecutive", "bincount"}
ALLOCATIONS = {"empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"}


class DeviceTensor(torch.Tensor):
    """A tensor of the fake device; `host` holds its numbers, and views share memory as their hosts do."""

    host: Tensor

    @staticmethod
    def __new__(cls, host: Tensor) -> DeviceTensor:
        tensor = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            host.shape,
            strides=host.stride(),
            storage_offset=host.storage_offset(),
            dtype=host.dtype,
            device=DEVICE,
        )
        tensor.host = host
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of the fake device outside `with FakeDevice()`")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"DeviceTensor({self.host!r})"


class FakeDevice(TorchDispatchMode):
    """Counts while open. fused: ops of flowfast are one launch each, as on a device with kernels; else their PyTorch
    reference runs op by op."""

    def __init__(self, fused: bool = True):
        super().__init__()
        self.fused = fused
        self.lifted: list[bool] = []
        self.backward: list[Any] = []
        self.waits: Counter[str] = Counter()
        self.copies: Counter[str] = Counter()
        self.launches: Counter[str] = Counter()

    def __enter__(self) -> FakeDevice:
        self.lifted.append(torch._C._only_lift_cpu_tensors())
        torch._C._set_only_lift_cpu_tensors(True)  # shows the copy inside torch.tensor(list, device=...)
        self.backward.append(torch.autograd.set_multithreading_enabled(False))  # backward passes stay in this thread
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch._C._set_only_lift_cpu_tensors(self.lifted.pop())
        self.backward.pop().__exit__(*error)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Says not to import torch's compiler, which takes seconds."""
        return False

    def clear(self) -> None:
        for counter in (self.waits, self.copies, self.launches):
            counter.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func.namespace == "flowfast" and not self.fused:
            with self:
                return backends.OPS[func._schema.name.split("::")[1]].reference(*args, **kwargs)
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        inside = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        target = kwargs.get("device")
        to_device = target is not None and torch.device(target).type == DEVICE.type
        if not inside and not to_device:
            return func(*args, **kwargs)
        name = func._schema.name.split("::")[1]
        to_host = name == "_to_copy" and target is not None and not to_device
        to_host = to_host or (name == "copy_" and not isinstance(args[0], DeviceTensor))
        crosses = to_host or (name == "_to_copy" and not inside) or (name == "copy_" and len(inside) < len(tensors))
        if crosses:
            asynchronous = kwargs.get("non_blocking", False) or (name == "copy_" and len(args) > 2 and args[2])
            (self.copies if asynchronous else self.waits)[f"{name} at {where()}"] += 1
        else:
            outside = [tensor for tensor in tensors if not isinstance(tensor, DeviceTensor)]
            self.count(name, func, args, kwargs, outside)
        if to_device:
            kwargs["device"] = torch.device("cpu")
        owner = {id(tensor.host): tensor for tensor in inside}
        result = func(*unwrap(args), **unwrap(kwargs))
        if to_host or name in TO_NUMBER:
            return result

        def wrap(leaf: Any) -> Any:
            """In-place and out= ops give back the very tensor they were given."""
            if not isinstance(leaf, Tensor):
                return leaf
            return owner[id(leaf)] if id(leaf) in owner else DeviceTensor(leaf)

        return tree_map(wrap, result)

    def count(self, name: str, func: Any, args: Any, kwargs: dict[str, Any], outside: list[Tensor]) -> None:
        """An op on the device; outside: its operands on the host."""
        if name in TO_NUMBER | UNKNOWN_SHAPE or (name == "repeat_interleave" and kwargs.get("output_size") is None):
            self.waits[f"{name} at {where()}"] += 1
            return
        if name in ("index", "index_put", "index_put_", "_unsafe_index"):
            by_mask = any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])
            fills = name.startswith("index_put") and args[2].numel() == 1  # becomes masked_fill
            if any(tensor.dim() for tensor in outside) or (by_mask and not fills):
                self.waits[f"{name} at {where()}"] += 1
        elif name.startswith("new_") or name.endswith("_like"):
            pass  # their operand is an example of shape and type only
        elif any(tensor.dim() for tensor in outside) or (outside and name == "where"):
            raise RuntimeError(f"{func}: tensors on the device and on the host in one op, at {where()}")
        if name not in ALLOCATIONS and not is_view(func):
            self.launches[name] += 1


def is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(value.alias_info is not None and not value.alias_info.is_write for value in returns)


def unwrap(tree: Any) -> Any:
    return tree_map(lambda leaf: leaf.host if isinstance(leaf, DeviceTensor) else leaf, tree)


def where() -> str:
    """The line that asked, for the message of a failing test; scripted code shows as its caller."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and not frame.filename.endswith("fake_device.py"):
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "?"
