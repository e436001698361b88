"""Which kernel stands behind each op of `torch.ops.flowfast`, and how to change it.

Every op has a *reference* in plain PyTorch, which runs on any device. Two compiled libraries (`csrc/`, `compiled.py`)
add kernels: one for the CPU ("cpp"), which also has the schemas, the other, built with nvcc, for CUDA ("cuda"). Without
the first the same schemas are defined from Python, so that `torch.ops.flowfast.<op>(...)` works in eager and scripted
code either way and gives the same bits. Where a CUDA or ROCm device and triton are there, the Triton kernels of
`kernels/` come first on that device; triton itself is imported when the first of them runs.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from flowfast.errors import OptionError
from flowfast.ops import compiled
from flowfast.ops.compiled import Library
from flowfast.ops.registry import OPS

NAMESPACE = "flowfast"
BACKENDS = ("reference", "cpp", "triton", "cuda")


_registrations: list[torch.library.Library] = []  # a Library unregisters its kernels when it is collected
_overrides: list[torch.library.Library] = []  # what stands before the kernels of the compiled library
_forced = ""  # the backend that was asked for by name
_cpu: Library  # the compiled libraries, once `load` was called
_cuda: Library
_functions: ctypes.CDLL | None = None  # of the CPU's library; None without it


def load() -> None:
    """Loads the compiled libraries, or defines the schemas from Python and warns; then obeys FLOWFAST_BACKEND."""
    global _cpu, _cuda, _functions
    _cpu, _cuda = compiled.load()
    if not _cpu.obstacle:
        _functions = ctypes.CDLL(str(_cpu.path))
        _functions.flowfast_instruction_set.restype = ctypes.c_char_p
    definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, op in OPS.items():
        if _functions is None:
            definitions.define(op.schema)
        definitions.impl(name, op.reference, "CompositeExplicitAutograd")  # every device without a kernel of its own
        torch.library.register_fake(f"{NAMESPACE}::{name}", _no_output, lib=definitions)
    _registrations.append(definitions)

    wanted = os.environ.get("FLOWFAST_BACKEND", "")
    _force(wanted, "FLOWFAST_BACKEND")
    if not wanted and _functions is None:
        warnings.warn(
            f"flowfast runs its ops in plain PyTorch (no compiled library: {_cpu.obstacle}), with the same results but "
            f"more slowly; {compiled.remedy()}.",
            stacklevel=3,
        )


def _no_output(*_args: Any, **_kwargs: Any) -> None:
    """Fake kernel of every op: all of them write into their operands and return nothing."""


def _has_kernel(name: str, key: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", key))


@functools.cache
def _has_device() -> bool:
    return torch.cuda.is_available()  # True for ROCm too, whose dispatch key is also called CUDA


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _interpreted() -> bool:
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")  # as triton reads it


def _triton_keys() -> tuple[str, ...]:
    """Dispatch keys that Triton kernels can stand behind here."""
    if not _has_triton():
        return ()
    return (("CUDA",) if _has_device() else ()) + (("CPU",) if _interpreted() else ())


def _triton_kernels() -> dict[str, Callable[..., None]]:
    from flowfast.ops.triton import KERNELS

    return KERNELS


def _obstacle(backend: str) -> str:
    """Why a backend cannot be had here; "" where it can."""
    if backend == "cpp" and _functions is None:
        return f"needs the compiled library, but there is no compiled library: {_cpu.obstacle}"
    if backend == "triton" and not _has_triton():
        return "needs triton: `pip install triton`, or choose reference or cpp"
    if backend == "triton" and not _triton_keys():
        return (
            "needs a CUDA or ROCm device, and there is none; set TRITON_INTERPRET=1 before Python starts to run its "
            "kernels in Triton's interpreter (slow, for tests), or choose reference or cpp"
        )
    if backend == "cuda" and not _has_device():
        return "needs a CUDA device, and there is none; choose reference or cpp"
    if backend == "cuda" and _cuda.obstacle:
        return f"needs the compiled CUDA library: {_cuda.obstacle}; choose reference or triton"
    return ""


def _force(backend: str, source: str) -> None:
    """Installs a backend; "" the best there is on each device."""
    global _forced
    if backend and backend not in BACKENDS:
        raise OptionError(f"{source}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    while _overrides:
        _overrides.pop()._destroy()
    obstacle = _obstacle(backend)
    if obstacle:
        _install(_forced)
        raise OptionError(f"{source}: backend {backend} {obstacle}.")
    _forced = backend
    _install(backend)


def _keys_before(backend: str) -> tuple[str, ...]:
    """Dispatch keys on which Triton kernels stand first while a backend is forced; "" for none."""
    if backend in ("reference", "cuda"):
        return ()
    return tuple(key for key in _triton_keys() if key == "CUDA" or backend == "triton")


def _install(backend: str) -> None:
    before: dict[str, dict[str, Callable[..., None]]] = {}  # dispatch key: op: kernel
    if backend == "reference":
        before = {key: {n: op.reference for n, op in OPS.items() if _has_kernel(n, key)} for key in ("CPU", "CUDA")}
    elif _keys_before(backend):
        before = dict.fromkeys(_keys_before(backend), _triton_kernels())
    if not any(before.values()):
        return
    override = torch.library.Library(NAMESPACE, "IMPL")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
        for key, kernels in before.items():
            for name, kernel in kernels.items():
                override.impl(name, kernel, key)
    _overrides.append(override)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces one backend ("reference", "cpp", "triton" or "cuda") in the whole process while the context is open.

    "cpp" and "cuda" name the compiled library's kernels for the CPU and for CUDA, "triton" the kernels for CUDA and
    ROCm devices, or on a machine without one, where TRITON_INTERPRET=1 is set, the same in Triton's interpreter.

    Raises:
        OptionError: the backend is unknown, or not there.
    """
    before = _forced
    _force(backend, "use_backend")
    try:
        yield
    finally:
        _force(before, "use_backend")


def instruction_set() -> str:
    """What the compiled ops use on this processor: "scalar", "avx2" or "avx512"; "" without the library."""
    return "" if _functions is None else _functions.flowfast_instruction_set().decode()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Runs the compiled ops with a plainer instruction set while the context is open, for tests and benchmarks.

    Raises:
        OptionError: there is no compiled library, or this processor lacks the instruction set.
    """
    before = instruction_set()
    if _functions is None or not _functions.flowfast_use_instruction_set(name.encode()):
        raise OptionError(f"use_instruction_set: {name!r} does not run here; {before or 'no compiled library'} does.")
    try:
        yield
    finally:
        _functions.flowfast_use_instruction_set(before.encode())


def live(device: str = "") -> dict[str, tuple[str, str]]:
    """The backend of each op now, and why: {"branch_step": ("cpp", "compiled library ..."), ...}.

    device: "cpu" or "cuda" (also for ROCm); by default cuda where there is one.
    """
    key = (device or ("cuda" if _has_device() else "cpu")).upper()
    triton_keys = _keys_before(_forced)
    report = {}
    for name in OPS:
        if _forced == "reference":
            report[name] = ("reference", "forced by use_backend or FLOWFAST_BACKEND")
        elif key in triton_keys and name in _triton_kernels():
            report[name] = ("triton", _triton_reason(name))
        elif _has_kernel(name, key):
            used = f"{_cpu.path}, {instruction_set()}" if key == "CPU" else _cuda.path
            report[name] = ("cpp" if key == "CPU" else "cuda", f"compiled library {used}")
        else:
            library = _cpu if key == "CPU" else _cuda
            obstacle = library.obstacle or "it lacks this op"
            instead = "`pip install triton`, or " if key == "CUDA" else ""
            report[name] = ("reference", f"no compiled library: {obstacle}; {instead}{compiled.remedy()}")
    return report


def libraries() -> dict[str, str]:
    """What became of the two compiled libraries: {"libflowfast_ops.so": "loaded from ...", ...}."""
    return {
        name: f"not loaded: {library.obstacle}" if library.obstacle else f"loaded from {library.path}"
        for name, library in ((compiled.CPU, _cpu), (compiled.CUDA, _cuda))
    }


def _triton_reason(name: str) -> str:
    reason = f"triton {importlib.metadata.version('triton')}"
    if _interpreted():
        reason += ", interpreted on the CPU"
    return reason + (", the reference beyond 4096 particles a slot" if name == "resample" else "")
