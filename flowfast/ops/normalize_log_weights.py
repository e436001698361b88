"""Log-weights to normalised weights, effective sample size and log normaliser, per slot.

    weights_i = exp(l_i - m) / sum_j exp(l_j - m),  m = max l
    ess = (sum w)^2 / sum w^2  (Kish)
    log_normalizer = logsumexp(l) - log N

Every sum is a sum of integers (fixed point, 2^-42 of the largest term), so any order of summation gives the same bits,
and exp and log are written out with plain multiplications and additions: all backends agree exactly.
`csrc/core/log_weights.h` is the same in C++.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowfast.ops.checks import OperandError, check_dense, check_operand
from flowfast.ops.registry import register

MAX_PARTICLES = 2**20  # what the fixed-point sums of this module and of resample can hold

_LOG2E = 1.4426950408889634
_LN2_HIGH = 6.93147180369123816490e-01  # 32 significant bits: its product with an exponent is exact
_LN2_LOW = 1.90821492927058770002e-10
_EXP_CUTOFF = -708.0  # e^-708 is the last normal double
_FIXED_ONE = 2.0**42


def exp_nonpositive(x: Tensor) -> Tensor:
    """e^x for float64 x <= 0, exactly 0 below -708: 2^k times a Taylor polynomial (degree 13) on |r| <= ln(2) / 2."""
    inside = x.clamp(min=_EXP_CUTOFF)
    k = torch.round(inside * _LOG2E)
    r = (inside - k * _LN2_HIGH) - k * _LN2_LOW
    total = torch.full_like(x, 1.0 / math.factorial(13))
    for i in range(12, -1, -1):
        total = total * r + 1.0 / math.factorial(i)
    power_of_two = ((k.to(torch.int64) + 1023) << 52).view(torch.float64)
    return torch.where(x >= _EXP_CUTOFF, total * power_of_two, 0.0)


def log_positive(x: Tensor) -> Tensor:
    """ln(x) for positive normal float64 x: exponent ln(2) + 2 atanh((m - 1) / (m + 1)), m in [1 / sqrt(2), sqrt(2)]."""
    bits = x.view(torch.int64)
    exponent = ((bits >> 52) - 1023).to(torch.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    above = m > math.sqrt(2)
    m = torch.where(above, m * 0.5, m)
    exponent = torch.where(above, exponent + 1.0, exponent)
    s = (m - 1.0) / (m + 1.0)
    s2 = s * s
    total = torch.full_like(x, 1.0 / 21.0)
    for i in range(19, 0, -2):
        total = total * s2 + 1.0 / i
    return exponent * _LN2_HIGH + (exponent * _LN2_LOW + 2.0 * s * total)


def _sum(terms: Tensor) -> Tensor:
    """Sum over the last dimension, in integers."""
    return torch.round(terms * _FIXED_ONE).to(torch.int64).sum(-1, keepdim=True).to(torch.float64) / _FIXED_ONE


def check_weights(op: str, name: str, weights: Tensor) -> None:
    """The (slots, particles) matrix that fixes dtype, device and shape for the other operands."""
    check_dense(op, name, weights, weights.device)
    if weights.dtype not in (torch.float32, torch.float64):
        raise OperandError(f"{op}: {name} must be float32 or float64, got {weights.dtype}")
    if weights.dim() != 2 or not 1 <= weights.shape[1] <= MAX_PARTICLES:
        raise OperandError(
            f"{op}: {name} must have shape (slots, particles) with 1..{MAX_PARTICLES} particles, "
            f"got {tuple(weights.shape)}"
        )


def reference(log_weights: Tensor, weights: Tensor, ess: Tensor, log_normalizer: Tensor) -> None:
    """Writes `weights`, `ess` and `log_normalizer`.

    Args:
        log_weights: (S, N) float32 or float64, N at most 2^20. NaN counts as -inf; +inf ones share the slot.
        weights: (S, N), sum 1 in each slot; NaN where every log-weight is -inf. Below e^-708 of the largest: 0.
        ess: (S,) in 1..N; 0 where every log-weight is -inf.
        log_normalizer: (S,) logsumexp(log_weights) - log(N); -inf where every log-weight is -inf.

    Raises:
        OperandError: an operand has a wrong dtype, shape or layout.
    """
    check(log_weights, weights, ess, log_normalizer)
    logs = torch.where(log_weights.isnan(), -math.inf, log_weights.to(torch.float64))
    largest = logs.amax(-1, keepdim=True)
    terms = torch.where(logs == largest, 1.0, exp_nonpositive(logs - largest))
    total = _sum(terms)
    empty = largest == -math.inf
    weights.copy_(torch.where(empty, math.nan, terms / total))
    ess.copy_(torch.where(empty, 0.0, total * total / _sum(terms * terms)).squeeze(-1))
    log_normalizer.copy_((largest + log_positive(total / log_weights.shape[-1])).squeeze(-1))


def check(log_weights: Tensor, weights: Tensor, ess: Tensor, log_normalizer: Tensor) -> None:
    op, dtype, slots = "normalize_log_weights", log_weights.dtype, len(log_weights)
    check_weights(op, "log_weights", log_weights)
    check_operand(op, "weights", weights, dtype, tuple(log_weights.shape), log_weights.device)
    check_operand(op, "ess", ess, dtype, (slots,), log_weights.device)
    check_operand(op, "log_normalizer", log_normalizer, dtype, (slots,), log_weights.device)


register(
    "normalize_log_weights(Tensor log_weights, Tensor(a!) weights, Tensor(b!) ess, Tensor(c!) log_normalizer) -> ()",
    reference,
)
