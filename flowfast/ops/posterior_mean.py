"""Guidance and posterior mean after a model evaluation (Tweedie's formula in the affine form of the schedule's table):

    u_out[i]  = u_uncond[i] + guidance[i] (u[i] - u_uncond[i])      without u_uncond: u[i]
    x0_out[i] = D x[i] + E u_out[i]                                 coefficients of table[row[i]]

At guidance 1 u_uncond is not read and at guidance 0 u is not read, so both ends are exact; a zero D or E means that its
operand is not read. Arithmetic is float32 (u_out enters x0_out before it is rounded to the storage type); storage is
float32, bfloat16 or float16. Bytes moved: x, u, u_uncond in, u_out and x0_out out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops._float32 import fma32, round32
from flowfast.ops.branch_step import D, E, add_terms, check_table
from flowfast.ops.checks import OperandError, check_latents, check_operand, check_range
from flowfast.ops.registry import register


def reference(
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
    """Writes the guided velocities into `u_out` and the posterior means into `x0_out`.

    Args:
        x, u: (R, n) states and conditional velocities, float32, bfloat16 or float16 (called directly also float64).
        u_uncond: (R, n) unconditional velocities; needs `guidance`, (R,) float32, a scale for each lane.
        row: (R,) int64 row of the table (the transition); below 0: padding, its outputs stay untouched.
        table: (T, 8) float32, columns A, B, C, G, D, E, D_from, E_from.
        u_out, x0_out: (R, n), of x's dtype; may be u and x themselves. Without u_uncond there may be no u_out, which
            would be a copy of u.
        broken: (R,) bool; lanes whose x0_out is not finite are marked True, the others are left as they are.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    check(x, u, u_uncond, guidance, row, table, u_out, x0_out, broken)
    live = (row >= 0)[:, None]
    guided = u.double()
    if u_uncond is not None and guidance is not None:
        w, uncond = guidance.double()[:, None], u_uncond.double()
        if x.dtype == torch.float64:
            mixed = uncond + w * (guided - uncond)
        else:
            mixed = fma32(w, round32(guided - uncond), uncond)
        guided = torch.where(w == 1, guided, torch.where(w == 0, uncond, mixed))
    c = table[row.clamp(min=0)].double()[:, :, None].unbind(1)
    x0 = add_terms([c[D], c[E]], [x.double(), guided], x.dtype)
    x0_out.copy_(torch.where(live, x0.to(x.dtype), x0_out))
    if u_out is not None:
        u_out.copy_(torch.where(live, guided.to(x.dtype), u_out))
    if broken is not None:
        broken.logical_or_((row >= 0) & ~x0_out.isfinite().all(1))


def check(
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
    op = "posterior_mean"
    check_latents(op, "x", x)
    lanes, n = x.shape
    for name, latent in (("u", u), ("u_out", u_out), ("x0_out", x0_out), ("u_uncond", u_uncond)):
        if latent is not None:
            check_operand(op, name, latent, x.dtype, (lanes, n), x.device)
    if u_uncond is not None:
        if u_out is None:
            raise OperandError(f"{op}: u_uncond needs u_out; only without guidance it may be left out")
        if guidance is None:
            raise OperandError(f"{op}: u_uncond needs guidance, one scale a lane; pass both or neither")
        check_operand(op, "guidance", guidance, torch.float32, (lanes,), x.device)
    if broken is not None:
        check_operand(op, "broken", broken, torch.bool, (lanes,), x.device)
    check_operand(op, "row", row, torch.int64, (lanes,), x.device)
    check_table(op, table, x)
    check_range(op, "row", row, row >= 0, len(table))


register(
    "posterior_mean(Tensor x, Tensor u, Tensor? u_uncond, Tensor? guidance, Tensor row, Tensor table, "
    "Tensor(a!)? u_out, Tensor(b!) x0_out, Tensor(c!)? broken=None) -> ()",
    reference,
)
