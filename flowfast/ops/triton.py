"""The ops on Triton kernels: operands are checked as the reference checks them, then one kernel is launched.

Nothing here imports triton until an op runs. A launch neither waits for the device nor allocates. What the kernels do
not cover (float64 latents, which only tests use, and more than 4096 particles a slot in `resample`) the reference runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flowfast.ops import assign_lanes as _assign_lanes
from flowfast.ops import branch_step as _branch_step
from flowfast.ops import decide as _decide
from flowfast.ops import gather_ancestors as _gather_ancestors
from flowfast.ops import noise as _noise
from flowfast.ops import normalize_log_weights as _normalize_log_weights
from flowfast.ops import posterior_mean as _posterior_mean
from flowfast.ops import resample as _resample
from flowfast.ops.checks import OperandError


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
    u_out: Tensor | None,
    x0_out: Tensor,
    broken: Tensor | None = None,
) -> None:
    from flowfast.kernels.posterior_mean import posterior_mean as launch

    operands = (x, u, u_uncond, guidance, row, table, u_out, x0_out, broken)
    if x.dtype == torch.float64:
        return _posterior_mean.reference(*operands)
    _posterior_mean.check(*operands)
    launch(*operands)


def gather_ancestors_(x: Tensor, u: Tensor, ancestors: Tensor) -> None:
    from flowfast.kernels.gather_ancestors import gather_ancestors_ as launch

    _gather_ancestors.check(x, u, ancestors)
    launch(x, u, ancestors)


def normalize_log_weights(log_weights: Tensor, weights: Tensor, ess: Tensor, log_normalizer: Tensor) -> None:
    from flowfast.kernels.normalize_log_weights import normalize_log_weights as launch

    _normalize_log_weights.check(log_weights, weights, ess, log_normalizer)
    launch(log_weights, weights, ess, log_normalizer)


def resample(weights: Tensor, key: Tensor, row: Tensor, enabled: Tensor, scheme: int, ancestors: Tensor) -> None:
    from flowfast.kernels.resample import MAX_PARTICLES
    from flowfast.kernels.resample import resample as launch

    _resample.check(weights, key, row, enabled, scheme, ancestors)
    if weights.shape[1] > MAX_PARTICLES:
        return _resample.reference(weights, key, row, enabled, scheme, ancestors)
    launch(weights, key, row, enabled, scheme, ancestors)


def assign_lanes(*operands: Any) -> None:
    from flowfast.kernels.assign_lanes import assign_lanes as launch

    _assign_lanes.check(*operands)
    launch(*operands)


def decide(
    rewards: Tensor,
    temperature: float,
    bias: Tensor | None,
    ints: Tensor,
    floats: Tensor,
    flags: Tensor,
    x_lane: Tensor,
    u_lane: Tensor,
    x0_lane: Tensor,
    x: Tensor,
    u: Tensor,
    top_x: Tensor,
    top_x0: Tensor,
    slots: int,
    lanes: int,
    transitions: int,
    margin: float,
    carry: bool,
    next_width: int,
) -> None:
    """float64 latents, too: they are only moved."""
    from flowfast.kernels.decide import decide as launch

    latents = {"x_lane": x_lane, "u_lane": u_lane, "x0_lane": x0_lane, "x": x, "u": u, "top_x": top_x, "top_x0": top_x0}
    _decide.check(rewards, bias, ints, floats, flags, latents, slots, lanes, transitions, next_width)
    launch(
        rewards, temperature, bias, ints, floats, flags, x_lane, u_lane, x0_lane, x, u, top_x, top_x0, slots, lanes,
        transitions, margin, carry, next_width,
    )  # fmt: skip


_ALL = (
    normal_,
    uniform_,
    branch_step,
    posterior_mean,
    gather_ancestors_,
    normalize_log_weights,
    resample,
    assign_lanes,
    decide,
)
KERNELS: dict[str, Callable[..., None]] = {op.__name__: op for op in _ALL}
