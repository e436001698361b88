"""Log-weights to normalised weights, effective sample size and log normaliser, one program a slot.

    weights_i = exp(l_i - m) / sum_j exp(l_j - m),  m = max l;   ess = (sum w)^2 / sum w^2;   logsumexp(l) - log N

log_weights, weights: (S, N), ess, log_normalizer: (S,), float32 or float64; arithmetic float64, sums in integers (2^-42
of the largest term), exp and log written out: the bits of the reference and of csrc/core/log_weights.h, whatever the
order of summation. Bytes moved: log_weights three times (from cache after the first), weights once.
"""

import triton
import triton.language as tl
from torch import Tensor

CHUNK = 1024  # particles at a time

_ROUND: tl.constexpr = tl.constexpr(1.5 * 2.0**52)  # added and taken away: nearest even integer of |x| < 2^51
_LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)
_LN2_HIGH: tl.constexpr = tl.constexpr(6.93147180369123816490e-01)
_LN2_LOW: tl.constexpr = tl.constexpr(1.90821492927058770002e-10)
_SQRT2: tl.constexpr = tl.constexpr(1.4142135623730951)
_CUTOFF: tl.constexpr = tl.constexpr(-708.0)
_FIXED: tl.constexpr = tl.constexpr(2.0**42)


@triton.jit
def _double(value: tl.constexpr):
    return tl.full((), value, tl.float64)


@triton.jit
def exp_nonpositive(x):
    """e^x for float64 x <= 0, exactly 0 below -708: 2^k times a Taylor polynomial (degree 13) on |r| <= ln(2) / 2."""
    inside = tl.maximum(x, _double(_CUTOFF))
    k = (inside * _double(_LOG2E) + _double(_ROUND)) - _double(_ROUND)
    r = (inside - k * _double(_LN2_HIGH)) - k * _double(_LN2_LOW)
    factorial = _double(6227020800.0)  # 13!
    total = tl.zeros(x.shape, tl.float64) + 1.0 / factorial
    for i in tl.static_range(13):
        factorial = factorial / (13 - i)
        total = total * r + 1.0 / factorial
    power = ((k.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.where(x >= _double(_CUTOFF), total * power, 0.0)


@triton.jit
def log_positive(x):
    """ln(x) for positive normal float64 x: exponent ln(2) + 2 atanh((m - 1) / (m + 1)), m in [1 / sqrt(2), sqrt(2)]."""
    bits = x.to(tl.int64, bitcast=True)
    exponent = ((bits >> 52) - 1023).to(tl.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).to(tl.float64, bitcast=True)
    above = m > _double(_SQRT2)
    m = tl.where(above, m * 0.5, m)
    exponent = tl.where(above, exponent + 1.0, exponent)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    total = 1.0 / _double(21.0)
    for i in tl.static_range(10):
        total = total * s2 + 1.0 / _double(19.0 - 2 * i)
    return exponent * _double(_LN2_HIGH) + (exponent * _double(_LN2_LOW) + 2.0 * s * total)


@triton.jit
def _load(ptr, n, start, CHUNK: tl.constexpr):
    """float64 log-weights of a chunk; NaN and what lies beyond the end count as -inf."""
    index = start + tl.arange(0, CHUNK)
    value = tl.load(ptr + index, mask=index < n, other=float("-inf")).to(tl.float64)
    return tl.where(value != value, float("-inf"), value)


@triton.jit
def _fixed_sum(terms, inside):
    fixed = ((terms * _double(_FIXED) + _double(_ROUND)) - _double(_ROUND)).to(tl.int64)
    return tl.sum(tl.where(inside, fixed, 0))


@triton.jit
def _terms(logs, largest):
    return tl.where(logs == largest, _double(1.0), exp_nonpositive(logs - largest))


@triton.jit(do_not_specialize=["n"])  # a 1 would become a constant without a type
def _normalize_log_weights_kernel(log_weights_ptr, weights_ptr, ess_ptr, log_normalizer_ptr, n, CHUNK: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    log_weights = log_weights_ptr + slot * n
    weights = weights_ptr + slot * n
    largest = _double(float("-inf"))
    for start in range(0, n, CHUNK):
        largest = tl.maximum(largest, tl.max(_load(log_weights, n, start, CHUNK)))
    sums = tl.zeros((), tl.int64)
    squares = tl.zeros((), tl.int64)
    for start in range(0, n, CHUNK):
        inside = start + tl.arange(0, CHUNK) < n
        terms = _terms(_load(log_weights, n, start, CHUNK), largest)
        sums += _fixed_sum(terms, inside)
        squares += _fixed_sum(terms * terms, inside)
    total = sums.to(tl.float64) / _double(_FIXED)
    empty = largest == float("-inf")
    for start in range(0, n, CHUNK):
        index = start + tl.arange(0, CHUNK)
        share = _terms(_load(log_weights, n, start, CHUNK), largest) / total
        share = tl.where(tl.full(index.shape, largest, tl.float64) == float("-inf"), float("nan"), share)
        tl.store(weights + index, share.to(weights_ptr.dtype.element_ty), mask=index < n)
    ess = tl.where(empty, _double(0.0), total * total / (squares.to(tl.float64) / _double(_FIXED)))
    log_normalizer = largest + log_positive(total / n.to(tl.float64))
    tl.store(ess_ptr + slot, ess.to(ess_ptr.dtype.element_ty))
    tl.store(log_normalizer_ptr + slot, log_normalizer.to(log_normalizer_ptr.dtype.element_ty))


def normalize_log_weights(log_weights: Tensor, weights: Tensor, ess: Tensor, log_normalizer: Tensor) -> None:
    """Launches the kernel; operands as the reference checks them."""
    slots, n = log_weights.shape
    if slots == 0:
        return
    _normalize_log_weights_kernel[(slots,)](
        log_weights, weights, ess, log_normalizer, n, CHUNK=CHUNK, num_warps=4, enable_fp_fusion=False
    )
