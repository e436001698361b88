"""Resampling of the particles of each slot: weights to ancestors, survivors in place. Stream version 1.

All of it is integer arithmetic, so no result depends on the order of a sum, on threads or on the backend, and the
bounds of each scheme (counts in floor..ceil of N W, no offspring for a zero weight) hold exactly; a float32 cumulative
sum, which ends below 1 in most draws, would send systematic resampling to index N.

    q_i = round-half-even(2^40 w_i),  Q = sum q_i,  W_i = q_i / Q,  N <= 2^20
    word_i = Philox word of element i (key, row, candidate 0, chain 0, purpose 3);  u_i = word_i / 2^32 in [0, 1)
    a target T in 0..Q-1 chooses the one j with q_0 + .. + q_(j-1) <= T < q_0 + .. + q_j, hence never a j with q_j = 0

    0 multinomial  elements 0..N-1: T_i = floor(u_i Q)
    1 stratified   elements 0..N-1: T_i = floor((i Q + floor(u_i Q)) / N)
    2 systematic   element 0:       T_i = floor((i Q + floor(u_0 Q)) / N)
    3 residual     elements 0..R-1: floor(N W_j) copies of j; the R that are missing are multinomial in
                   r_j = N q_j mod Q: T_i = floor(u_i R Q) among the cumulative sums of r (Liu and Chen 1998)
    4 ssp          elements 1..N-1: floor(N W_j) copies of j, then the Srinivasan sampling process on r_j, particle j
                   using element j, see `ssp_copies` (Gerber, Chopin, Whiteley 2019, Annals of Statistics 47)

`csrc/core/resample.h` is the same in C++.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops import noise
from flowfast.ops.checks import OperandError, check_operand, check_range
from flowfast.ops.normalize_log_weights import check_weights
from flowfast.ops.registry import register

RESAMPLING = {"multinomial": 0, "stratified": 1, "systematic": 2, "residual": 3, "ssp": 4}
MULTINOMIAL, STRATIFIED, SYSTEMATIC, RESIDUAL, SSP = RESAMPLING.values()
_ONE = 2**40


def scale_by_word(word: Tensor, total: Tensor) -> Tensor:
    """floor(word * total / 2^32) for 0 <= total <= 2^61, in two halves so that nothing leaves 63 bits."""
    return (word * (total >> 31) + (word * (total & 0x7FFFFFFF) >> 31)) >> 1


def count_draws(cumulative: Tensor, targets: Tensor, drawn: Tensor) -> Tensor:
    """How often each index is chosen by the targets (S, N) where drawn (S, N) is 1, given cumulative sums (S, N)."""
    last = cumulative.shape[-1] - 1
    chosen = torch.searchsorted(cumulative, targets, right=True).clamp(max=last)  # beyond the end: not drawn
    return torch.zeros_like(cumulative).scatter_add_(-1, chosen, drawn.to(torch.int64))


def ssp_copies(remainders: Tensor, total: Tensor, word: Tensor) -> Tensor:
    """The copies (S, N), 0 or 1, that the Srinivasan sampling process gives to remainders (S, N) in 0..total-1.

    The open particle, at first 0, meets j = 1, 2, ... Where the two hold less than total together, one of them ends at
    0 and the other holds the sum; otherwise one becomes a copy and the other holds the sum - total. The odds keep both
    expectations. Whoever holds what is left is open next. How much that is after j, the sum of the remainders up to j
    mod total, does not depend on who holds it, so all meetings are decided in parallel.
    """
    n = remainders.shape[-1]
    index = torch.arange(n, device=remainders.device).expand_as(remainders)
    before = remainders.cumsum(-1) - remainders
    held = before % total
    both = held + remainders
    full = both >= total
    odds_of = torch.where(full, 2 * total - both, both)
    odds = torch.where(full, total - remainders, remainders)
    takes_over = (scale_by_word(word, odds_of) < odds) & (index > 0)
    open_after = torch.where(takes_over, index, 0).cummax(-1).values
    open_before = torch.where(index > 0, open_after.roll(1, -1), 0)
    copied = torch.where(takes_over, open_before, index)
    return torch.zeros_like(remainders).scatter_add_(-1, copied, (full & (index > 0)).to(torch.int64))


def count_offspring(weights: Tensor, word: Tensor, scheme: int) -> tuple[Tensor, Tensor]:
    """Offspring counts (S, N) int64 and, (S, 1) bool, where they hold: where the weights are a distribution.

    Args:
        weights: (S, N), sum 1.
        word: (S, N) int64, Philox words 0..N-1 of each slot.
        scheme: a value of RESAMPLING.
    """
    n = weights.shape[-1]
    within = (weights >= 0) & (weights <= 2)
    quantized = torch.round(torch.where(within, weights, 0.0).to(torch.float64) * _ONE).to(torch.int64)
    total = quantized.sum(-1, keepdim=True)
    valid = within.all(-1, keepdim=True) & (total >= _ONE // 2) & (total <= 2 * _ONE)
    total = torch.where(valid, total, _ONE)
    index = torch.arange(n, device=weights.device).expand_as(quantized)

    if scheme in (MULTINOMIAL, STRATIFIED, SYSTEMATIC):
        offset = scale_by_word(word[:, :1] if scheme == SYSTEMATIC else word, total)
        targets = offset.expand_as(index) if scheme == MULTINOMIAL else (index * total + offset) // n
        return count_draws(quantized.cumsum(-1), targets, torch.ones_like(index)), valid

    shares = n * quantized
    whole = shares // total
    remainders = shares % total
    if scheme == SSP:
        return whole + ssp_copies(remainders, total, word), valid
    missing = n - whole.sum(-1, keepdim=True)
    targets = scale_by_word(word, missing * total)
    return whole + count_draws(remainders.cumsum(-1), targets, index < missing), valid


def ancestors_from_counts(counts: Tensor) -> Tensor:
    """Ancestors (S, N) with a[i] = i wherever counts[i] > 0, for counts (S, N) of sum N.

    The further copies, in order of index, go to the slots without offspring, in order of index
    (Murray, Lee, Jacob, arXiv 1301.4019).
    """
    index = torch.arange(counts.shape[-1], device=counts.device).expand_as(counts)
    dead = counts == 0
    further = (counts - 1).clamp(min=0).cumsum(-1)
    parent = torch.searchsorted(further, dead.cumsum(-1) - 1, right=True)
    return torch.where(dead, parent, index)


def reference(weights: Tensor, key: Tensor, row: Tensor, enabled: Tensor, scheme: int, ancestors: Tensor) -> None:
    """Writes `ancestors`.

    Args:
        weights: (S, N) float32 or float64, sum 1 in each slot, as `normalize_log_weights` leaves them, N at most 2^20.
        key, row: (S,) int64, address of the slot's words; row: the transition, < 2^28.
        enabled: (S,) bool; identity where False, whatever the weights.
        scheme: a value of RESAMPLING.
        ancestors: (S, N) int64 in 0..N-1 with a[i] = i wherever i has offspring, so a[a[i]] = a[i]. A slot whose
            weights are no distribution (NaN, negative, sum outside [1/2, 2]) keeps its particles: identity.

    Raises:
        OperandError: the scheme is unknown, or an operand has a wrong dtype, shape, layout or value.
    """
    check(weights, key, row, enabled, scheme, ancestors)
    n = weights.shape[1]
    zero = torch.zeros_like(key)
    word = noise.words(key, row, zero, zero, noise.RESAMPLING, n)
    counts, valid = count_offspring(weights, word, scheme)
    identity = torch.arange(n, device=weights.device).expand_as(counts)
    ancestors.copy_(torch.where(valid & enabled.unsqueeze(-1), ancestors_from_counts(counts), identity))


def check(weights: Tensor, key: Tensor, row: Tensor, enabled: Tensor, scheme: int, ancestors: Tensor) -> None:
    op = "resample"
    check_weights(op, "weights", weights)
    slots, n = weights.shape
    check_operand(op, "key", key, torch.int64, (slots,), weights.device)
    check_operand(op, "row", row, torch.int64, (slots,), weights.device)
    check_operand(op, "enabled", enabled, torch.bool, (slots,), weights.device)
    check_operand(op, "ancestors", ancestors, torch.int64, (slots, n), weights.device)
    check_range(op, "row", row, enabled, noise.ROW_LIMIT)
    if scheme not in RESAMPLING.values():
        choices = ", ".join(f"{number} {name}" for name, number in RESAMPLING.items())
        raise OperandError(f"{op}: scheme must be one of {choices}, got {scheme}")


register(
    "resample(Tensor weights, Tensor key, Tensor row, Tensor enabled, int scheme, Tensor(a!) ancestors) -> ()",
    reference,
)
