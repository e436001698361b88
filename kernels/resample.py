"""Resampling of the particles of each slot, one program a slot, up to MAX_PARTICLES of them. Stream version 1.

weights: (S, N) float32 or float64; key, row: (S,) int64; enabled: (S,) bool; ancestors: (S, N) int64 with a[i] = i
wherever i has offspring. All of it is integer arithmetic, so any order of summation gives the ancestors of the
reference; flowfast/ops/resample.py states the schemes and csrc/core/resample.h is the same in C++. Bytes moved: weights
in, ancestors out.
"""

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels.noise import BLOCK, COUNTERS, key_words, philox, row_word

MAX_PARTICLES = 4096  # a slot lives in the registers of one program

MULTINOMIAL: tl.constexpr = tl.constexpr(0)
STRATIFIED: tl.constexpr = tl.constexpr(1)
SYSTEMATIC: tl.constexpr = tl.constexpr(2)
SSP: tl.constexpr = tl.constexpr(4)
_PURPOSE: tl.constexpr = tl.constexpr(3)
_ONE: tl.constexpr = tl.constexpr(2**40)
_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**52)  # added and taken away: nearest even integer of |x| < 2^51


@triton.jit
def element_word(element, key, row):
    """Philox word of each element of a slot's stream, as int64."""
    k0, k1 = key_words(key)
    counter = (element // BLOCK * COUNTERS + element % COUNTERS).to(tl.uint32)
    zero = tl.zeros(counter.shape, tl.uint32)
    w0, w1, w2, w3 = philox(counter, zero, zero + row_word(row, tl.full((), _PURPOSE, tl.uint32)), zero, k0, k1)
    plane = element % BLOCK // COUNTERS
    return tl.where(plane == 0, w0, tl.where(plane == 1, w1, tl.where(plane == 2, w2, w3))).to(tl.int64)


@triton.jit
def scale_by_word(word, total):
    """floor(word * total / 2^32) for 0 <= total <= 2^61, in two halves so that nothing leaves 63 bits."""
    return (word * (total >> 31) + ((word * (total & 0x7FFFFFFF)) >> 31)) >> 1


@triton.jit
def count_not_above(ascending, target, SIZE: tl.constexpr, LOG: tl.constexpr):
    """How many entries of an ascending vector of SIZE = 2^LOG are <= target, SIZE - 1 at most."""
    found = tl.zeros(target.shape, tl.int32)
    for step in tl.static_range(LOG):
        half = SIZE >> (step + 1)
        found = tl.where(tl.gather(ascending, found + half - 1, 0) <= target, found + half, found)
    return found


@triton.jit
def _larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def ssp_copies(remainders, total, word, index, inside, SIZE: tl.constexpr):
    """Srinivasan sampling process: 0 or 1 copy of each particle; see `ssp_copies` in flowfast/ops/resample.py."""
    held = (tl.cumsum(remainders, 0) - remainders) % total
    both = held + remainders
    full = both >= total
    odds_of = tl.where(full, 2 * total - both, both)
    odds = tl.where(full, total - remainders, remainders)
    meets = inside & (index > 0)
    takes_over = meets & (scale_by_word(word, odds_of) < odds)
    open_after = tl.associative_scan(tl.where(takes_over, index, 0), 0, _larger)
    open_before = tl.gather(open_after, tl.maximum(index - 1, 0), 0)
    return tl.histogram(tl.where(takes_over, open_before, index), SIZE, mask=full & meets).to(tl.int64)


@triton.jit
def _resample_kernel(
    weights_ptr, key_ptr, row_ptr, enabled_ptr, ancestors_ptr, n, SCHEME: tl.constexpr, SIZE: tl.constexpr,
    LOG: tl.constexpr,
):  # fmt: skip
    slot = tl.program_id(0).to(tl.int64)
    index = tl.arange(0, SIZE)
    inside = index < n
    weight = tl.load(weights_ptr + slot * n + index, mask=inside, other=0.0).to(tl.float64)
    within = (weight >= 0) & (weight <= 2)  # false for NaN
    fixed = tl.where(within, weight, 0.0) * 1099511627776.0
    quantized = ((fixed + _ROUND) - _ROUND).to(tl.int64)
    total = tl.sum(quantized)
    valid = (tl.sum((~within).to(tl.int32)) == 0) & (total >= _ONE // 2) & (total <= 2 * _ONE)
    total = tl.where(valid, total, _ONE)
    word = element_word(index, tl.load(key_ptr + slot), tl.load(row_ptr + slot))

    if SCHEME <= SYSTEMATIC:
        if SCHEME == SYSTEMATIC:
            word = tl.zeros(word.shape, tl.int64) + tl.sum(tl.where(index == 0, word, 0))
        target = scale_by_word(word, total)
        if SCHEME != MULTINOMIAL:
            target = (index * total + target) // n
        chosen = count_not_above(tl.cumsum(quantized, 0), target, SIZE, LOG)
        counts = tl.histogram(chosen, SIZE, mask=inside).to(tl.int64)
    else:
        shares = n * quantized
        whole = shares // total
        remainders = shares % total
        if SCHEME == SSP:
            counts = whole + ssp_copies(remainders, total, word, index, inside, SIZE)
        else:
            missing = n - tl.sum(whole)
            chosen = count_not_above(tl.cumsum(remainders, 0), scale_by_word(word, missing * total), SIZE, LOG)
            counts = whole + tl.histogram(chosen, SIZE, mask=index < missing).to(tl.int64)

    # The further copies, in order of index, go to the slots without offspring, in order of index.
    dead = inside & (counts == 0)
    further = tl.cumsum(tl.maximum(counts - 1, 0), 0)
    parent = count_not_above(further, tl.cumsum(dead.to(tl.int64), 0) - 1, SIZE, LOG)
    moves = dead & (tl.zeros(index.shape, tl.int32) + (valid & (tl.load(enabled_ptr + slot) != 0)).to(tl.int32) != 0)
    tl.store(ancestors_ptr + slot * n + index, tl.where(moves, parent, index).to(tl.int64), mask=inside)


def resample(weights: Tensor, key: Tensor, row: Tensor, enabled: Tensor, scheme: int, ancestors: Tensor) -> None:
    """Launches the kernel; operands as the reference checks them, N at most MAX_PARTICLES."""
    slots, n = weights.shape
    if slots == 0:
        return
    size = max(2, triton.next_power_of_2(n))
    _resample_kernel[(slots,)](
        weights, key, row, enabled, ancestors, n, SCHEME=scheme, SIZE=size, LOG=size.bit_length() - 1,
        num_warps=4 if size <= 1024 else 8, enable_fp_fusion=False,
    )  # fmt: skip
