"""What the kernels over (rows, elements) matrices share: where an element lies, and how the work is cut up.

A program owns one row and a run of chunks of it. Rows lie on the grid's x axis (up to 2^31), runs on its y axis.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

MAX_RUNS = 65535  # of a CUDA or HIP grid's y axis
RESIDENT = 32  # warps that a multiprocessor holds, about: fewer programs than that leave it idle


@triton.jit
def element_offset(row, n, first):
    """Offset of element `first` of a row in a (rows, n) matrix, in 64 bits: matrices may exceed 2^31 elements."""
    return row.to(tl.int64) * n + first


@triton.jit
def copy_row(source, target, n, first, run, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    """Copies chunks first .. first + run - 1 of a row, bit by bit, from pointer to pointer."""
    offsets = tl.arange(0, CHUNK)
    for i in range(run):
        start = element_offset(first + i, CHUNK, 0)
        mask = None if EVEN else offsets < n - start
        tl.store(target + start + offsets, tl.load(source + start + offsets, mask=mask), mask=mask)


@triton.jit
def in_use(coefficient, SHAPE: tl.constexpr):
    """Whether a term counts; spread before it is compared, since the interpreter cannot spread a comparison."""
    return tl.full(SHAPE, coefficient, tl.float32) != 0


@triton.jit
def widen(value, PTX: tl.constexpr):
    """float32 of a stored number. PTX: two bfloat16 of one register at a time, one instruction each."""
    if PTX and value.dtype == tl.bfloat16:
        wide = tl.inline_asm_elementwise(
            "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;", "=r,=r,r", [value], tl.float32, True, 2
        )
    else:
        wide = value.to(tl.float32)
    return wide


@triton.jit
def narrow(value, ptr, PTX: tl.constexpr):
    """float32 to the type that ptr stores, nearest even, like torch."""
    if ptr.dtype.element_ty == tl.bfloat16 and not PTX:  # the interpreter would cut bits off; AMD has no instruction
        bits = value.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        rounded = tl.where(value != value, 0x7FC0, rounded)
        stored = rounded.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        stored = value.to(ptr.dtype.element_ty)
    return stored


def interpreted() -> bool:
    """Whether TRITON_INTERPRET runs the kernels in Python, on tensors of the CPU."""
    return bool(triton.knobs.runtime.interpret)


@functools.cache
def is_nvidia() -> bool:
    return not interpreted() and torch.version.hip is None


@functools.cache
def warp_size() -> int:
    return 64 if torch.version.hip is not None and not interpreted() else 32


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def iota(device: torch.device, count: int) -> Tensor:
    """0, 1, .., count - 1 as int32, made once a device: the first launch may not be inside a graph capture."""
    return torch.arange(count, dtype=torch.int32, device=device)


def cut(rows: int, n: int, chunk: int, device: torch.device, longest: int = 4) -> tuple[tuple[int, int], int]:
    """Grid and chunks a program: long runs share the work before the loop, but only once every processor is busy."""
    chunks = triton.cdiv(n, chunk)
    run = max(1, min(longest, rows * chunks // (RESIDENT * _multiprocessors(device))))
    run = max(run, triton.cdiv(chunks, MAX_RUNS))
    return (rows, triton.cdiv(chunks, run)), run
