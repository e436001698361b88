"""Which kernel stands behind each op of `torch.ops.flowfast`, and how to change it.

Every op has a *reference* in plain PyTorch, which runs on any device. The compiled library (`csrc/`, built by setup.py
into `flowfast/lib/`) adds kernels for the CPU. Without it the same schemas are defined from Python, so that
`torch.ops.flowfast.<op>(...)` works in eager and scripted code either way and gives the same bits.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowfast.errors import OptionError

NAMESPACE = "flowfast"
BACKENDS = ("reference", "cpp", "triton", "cuda")
LIBRARY = Path(__file__).parent.parent / "lib" / "libflowfast_ops.so"


class Op(NamedTuple):
    """One op: its schema (the same text as in csrc/ops.cpp) and the reference kernel, which writes into its outputs."""

    schema: str
    reference: Callable[..., None]


OPS: dict[str, Op] = {}
_registrations: list[torch.library.Library] = []  # a Library unregisters its kernels when it is collected
_forced: list[torch.library.Library] = []
_reason = ""  # why the compiled library is, or is not, in use
_library: ctypes.CDLL | None = None


def register(schema: str, reference: Callable[..., None]) -> None:
    """Adds an op. Called once by each module of `flowfast.ops`, before `load`."""
    OPS[schema.split("(", 1)[0]] = Op(schema, reference)


def load() -> None:
    """Loads the compiled library, or defines the schemas from Python and warns; then obeys FLOWFAST_BACKEND.

    FLOWFAST_LIBRARY names another build of the library (a sanitizer build, say); empty means none.
    """
    global _reason, _library
    path = os.environ.get("FLOWFAST_LIBRARY", str(LIBRARY))
    try:
        if not path:
            raise OSError("FLOWFAST_LIBRARY is empty")
        if not os.path.exists(path):
            raise OSError(f"{path} does not exist")
        torch.ops.load_library(path)
        _library = ctypes.CDLL(path)
        _library.flowfast_instruction_set.restype = ctypes.c_char_p
        _reason = f"compiled library {path}"
    except OSError as error:
        _reason = f"no compiled library: {error}"
    definitions = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, op in OPS.items():
        if _library is None:
            definitions.define(op.schema)
        definitions.impl(name, op.reference, "CompositeExplicitAutograd")  # every device without a kernel of its own
        torch.library.register_fake(f"{NAMESPACE}::{name}", _no_output, lib=definitions)
    _registrations.append(definitions)

    wanted = os.environ.get("FLOWFAST_BACKEND", "")
    if wanted:
        _force(wanted, "FLOWFAST_BACKEND")
    elif _library is None:
        warnings.warn(
            f"flowfast runs its ops in plain PyTorch ({_reason}), with the same results but more slowly; "
            "`python setup.py build_ext --inplace` builds the fast ones (it needs a C++20 compiler, cmake and ninja).",
            stacklevel=3,
        )


def _no_output(*_args: Any, **_kwargs: Any) -> None:
    """Fake kernel of every op: all of them write into their operands and return nothing."""


def _has_cpu_kernel(name: str) -> bool:
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU"))


def _force(backend: str, source: str) -> None:
    if backend not in BACKENDS:
        raise OptionError(f"{source}: unknown backend {backend!r}; choose one of {', '.join(BACKENDS)}.")
    if backend in ("triton", "cuda"):
        raise OptionError(f"{source}: this version has no {backend} kernels; choose reference or cpp.")
    if backend == "cpp" and _library is None:
        raise OptionError(f"{source}: backend cpp needs the compiled library, but there is {_reason}.")
    while _forced:
        _forced.pop()._destroy()
    if backend == "reference" and _library is not None:
        override = torch.library.Library(NAMESPACE, "IMPL")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="(?s).*Overriding a previously registered kernel")
            for name, op in OPS.items():
                if _has_cpu_kernel(name):
                    override.impl(name, op.reference, "CPU")
        _forced.append(override)


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Forces one backend ("reference" or "cpp") in the whole process while the context is open.

    Raises:
        OptionError: the backend is unknown, or not there.
    """
    before = "reference" if _forced or _library is None else "cpp"
    _force(backend, "use_backend")
    try:
        yield
    finally:
        _force(before, "use_backend")


def instruction_set() -> str:
    """What the compiled ops use on this processor: "scalar", "avx2" or "avx512"; "" without the library."""
    return "" if _library is None else _library.flowfast_instruction_set().decode()


@contextlib.contextmanager
def use_instruction_set(name: str) -> Iterator[None]:
    """Runs the compiled ops with a plainer instruction set while the context is open, for tests and benchmarks.

    Raises:
        OptionError: there is no compiled library, or this processor lacks the instruction set.
    """
    before = instruction_set()
    if _library is None or not _library.flowfast_use_instruction_set(name.encode()):
        raise OptionError(f"use_instruction_set: {name!r} does not run here; {before or 'no compiled library'} does.")
    try:
        yield
    finally:
        _library.flowfast_use_instruction_set(before.encode())


def live() -> dict[str, tuple[str, str]]:
    """The backend of each op on CPU tensors now, and why: {"branch_step": ("cpp", "compiled library ..."), ...}."""
    report = {}
    for name in OPS:
        if _forced:
            report[name] = ("reference", "forced by use_backend or FLOWFAST_BACKEND")
        elif _has_cpu_kernel(name):
            report[name] = ("cpp", f"{_reason}, {instruction_set()}")
        else:
            report[name] = ("reference", _reason if _library is None else "the compiled library lacks this op")
    return report
