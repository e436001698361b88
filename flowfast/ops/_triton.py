"""The ops on Triton kernels: operands are checked as the reference checks them, then one kernel is launched.

Nothing here imports triton until an op runs. A launch neither waits for the device nor allocates. What the kernels do
not cover (float64 latents, which only tests use, and more than 4096 particles a slot in `resample`) the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from flowfast.ops import branch_step as _branch_step
from flowfast.ops import noise as _noise
from flowfast.ops import posterior_mean as _posterior_mean
from flowfast.ops import resample as _resample
from flowfast.ops._checks import OperandError, check_latents, check_operand, check_range
from flowfast.ops.normalize_log_weights import check_weights


def normal_(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    from flowfast.kernels import noise

    if out.dtype == torch.float64:
        return _noise.normal_reference(out, key, row, candidate, chain, purpose)
    _noise._check_fill("normal_", out, key, row, candidate, chain, purpose)
    noise.normal_(out, key, row, candidate, chain, purpose)


def uniform_(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    from flowfast.kernels import noise

    _noise._check_fill("uniform_", out, key, row, candidate, chain, purpose)
    if out.dtype != torch.float32:
        raise OperandError(f"uniform_: out must have dtype torch.float32, got {out.dtype}")
    noise.uniform_(out, key, row, candidate, chain, purpose)


def branch_step(
    x: Tensor,
    u: Tensor,
    parent: Tensor,
    row: Tensor,
    key: Tensor,
    candidate: Tensor,
    chain: Tensor,
    table: Tensor,
    out: Tensor,
    x0_out: Tensor | None = None,
    grad: Tensor | None = None,
) -> None:
    from flowfast.kernels.branch_step import branch_step as launch

    operands = (x, u, parent, row, key, candidate, chain, table, out, x0_out, grad)
    if x.dtype == torch.float64:
        return _branch_step.reference(*operands)
    _branch_step._check(*operands)
    launch(*operands)


def posterior_mean(
    x: Tensor,
    u: Tensor,
    u_uncond: Tensor | None,
    guidance: Tensor | None,
    row: Tensor,
    table: Tensor,
    u_out: Tensor,
    x0_out: Tensor,
) -> None:
    from flowfast.kernels.posterior_mean import posterior_mean as launch

    operands = (x, u, u_uncond, guidance, row, table, u_out, x0_out)
    if x.dtype == torch.float64:
        return _posterior_mean.reference(*operands)
    _posterior_mean._check(*operands)
    launch(*operands)


def gather_ancestors_(x: Tensor, u: Tensor, ancestors: Tensor) -> None:
    from flowfast.kernels.gather_ancestors import gather_ancestors_ as launch

    op = "gather_ancestors_"
    check_latents(op, "x", x)
    check_operand(op, "u", u, x.dtype, tuple(x.shape), x.device)
    check_operand(op, "ancestors", ancestors, torch.int64, (len(x),), x.device)
    check_range(op, "ancestors", ancestors, torch.ones_like(ancestors, dtype=torch.bool), len(x))
    if ancestors.device.type == "cpu" and not torch.equal(ancestors[ancestors], ancestors):
        raise OperandError(f"{op}: an ancestor must keep its own row; permute the ancestors as resample does")
    launch(x, u, ancestors)


def promote_(x_store: Tensor, u_store: Tensor, x_lane: Tensor, u_lane: Tensor, source: Tensor) -> None:
    from flowfast.kernels.promote import promote_ as launch

    op = "promote_"
    check_latents(op, "x_store", x_store)
    check_latents(op, "x_lane", x_lane)
    (rows, n), lanes = x_store.shape, len(x_lane)
    check_operand(op, "u_store", u_store, x_store.dtype, (rows, n), x_store.device)
    check_operand(op, "x_lane", x_lane, x_store.dtype, (lanes, n), x_store.device)
    check_operand(op, "u_lane", u_lane, x_store.dtype, (lanes, n), x_store.device)
    check_operand(op, "source", source, torch.int64, (rows,), x_store.device)
    check_range(op, "source", source, source >= 0, lanes)
    launch(x_store, u_store, x_lane, u_lane, source)


def rollover(
    rewards: Tensor,
    live: Tensor,
    next_quota: Tensor,
    carry: bool,
    quota: Tensor,
    threshold: Tensor,
    best_child: Tensor,
    winner: Tensor,
    advance: Tensor,
    used: Tensor,
) -> None:
    from flowfast.kernels.rollover import rollover as launch

    op = "rollover"
    if rewards.dim() != 2:
        raise OperandError(f"{op}: rewards must have shape (chains, lanes), got {tuple(rewards.shape)}")
    chains, lanes = rewards.shape
    check_operand(op, "rewards", rewards, torch.float32, (chains, lanes), rewards.device)
    check_operand(op, "live", live, torch.bool, (chains, lanes), rewards.device)
    integers = {"next_quota": next_quota, "quota": quota, "winner": winner, "advance": advance, "used": used}
    for name, column in integers.items():
        check_operand(op, name, column, torch.int64, (chains,), rewards.device)
    check_operand(op, "threshold", threshold, torch.float32, (chains,), rewards.device)
    check_operand(op, "best_child", best_child, torch.float32, (chains,), rewards.device)
    launch(rewards, live, next_quota, carry, quota, threshold, best_child, winner, advance, used)


def normalize_log_weights(log_weights: Tensor, weights: Tensor, ess: Tensor, log_normalizer: Tensor) -> None:
    from flowfast.kernels.normalize_log_weights import normalize_log_weights as launch

    op, dtype, slots = "normalize_log_weights", log_weights.dtype, len(log_weights)
    check_weights(op, "log_weights", log_weights)
    check_operand(op, "weights", weights, dtype, tuple(log_weights.shape), log_weights.device)
    check_operand(op, "ess", ess, dtype, (slots,), log_weights.device)
    check_operand(op, "log_normalizer", log_normalizer, dtype, (slots,), log_weights.device)
    launch(log_weights, weights, ess, log_normalizer)


def resample(weights: Tensor, key: Tensor, row: Tensor, enabled: Tensor, scheme: int, ancestors: Tensor) -> None:
    from flowfast.kernels.resample import MAX_PARTICLES
    from flowfast.kernels.resample import resample as launch

    op = "resample"
    check_weights(op, "weights", weights)
    slots, n = weights.shape
    if n > MAX_PARTICLES or scheme not in _resample.RESAMPLING.values():
        return _resample.reference(weights, key, row, enabled, scheme, ancestors)
    check_operand(op, "key", key, torch.int64, (slots,), weights.device)
    check_operand(op, "row", row, torch.int64, (slots,), weights.device)
    check_operand(op, "enabled", enabled, torch.bool, (slots,), weights.device)
    check_operand(op, "ancestors", ancestors, torch.int64, (slots, n), weights.device)
    check_range(op, "row", row, enabled, _noise.ROW_LIMIT)
    launch(weights, key, row, enabled, scheme, ancestors)


_ALL = (
    normal_,
    uniform_,
    branch_step,
    posterior_mean,
    gather_ancestors_,
    promote_,
    rollover,
    normalize_log_weights,
    resample,
)
KERNELS: dict[str, Callable[..., None]] = {op.__name__: op for op in _ALL}
