"""float32 arithmetic to the last bit in plain PyTorch, on float64 tensors whose values are float32 numbers.

PyTorch has no fused multiply-add that is the same everywhere, so it is made of float64: the product of two float32
numbers is exact there, and only the way back from float64 needs care.
"""

from __future__ import annotations

import torch
from torch import Tensor

_TIE_MASK, _TIE = (1 << 29) - 1, 1 << 28  # the 29 bits that float64 has below float32, and the middle of them


def round32(value: Tensor) -> Tensor:
    """Nearest float32 number, as float64."""
    return value.float().double()


def fma32(a: Tensor | float, b: Tensor, c: Tensor | float) -> Tensor:
    """float32 `fma(a, b, c)` with its one rounding; on float64 tensors or numbers of float32 values, broadcast."""
    product = a * b
    total = product + c
    # Rounding twice (sum to float64, float64 to float32) goes wrong only where the first one lands on a tie of the
    # second. That is rare enough (2^-29) to look for it; off the CPU looking would make the host wait.
    if total.device.type == "cpu" and not bool(((total.view(torch.int64) & _TIE_MASK) == _TIE).any()):
        return round32(total)
    # Round to odd (Boldo, Melquiond 2008): cut the sum off and mark that something was lost in the last bit.
    part = total - product
    error = (product - (total - part)) + (c - part)  # Knuth's TwoSum: total + error is exact
    bits = total.view(torch.int64) - (error * total.sign() < 0).long()
    return round32((bits | (error.abs() > 0).long()).view(torch.float64))  # a NaN, beside infinity, marks nothing
