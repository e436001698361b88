"""One stochastic step of every lane from its parent, with the noise made on the way: the SDE step of Kim et al. 2025,
arXiv 2503.19385, in the affine form that all integrators of `flowfast.flow` share.

    out[i]    = A x[p] + B u[p] + C z[i] + G grad[i]        p = parent[i], coefficients of table[row[i]]
    x0_out[i] = D_from x[p] + E_from u[p]                   the posterior mean of the parent, from the same read

z[i] is `flowfast.ops.noise` at (key[i], row[i], candidate[i], chain[i]), purpose 0 at row 0 and 1 elsewhere. A
coefficient that is exactly 0 means that its operand is not read. Arithmetic is float32, one fused multiply-add a term
in the order x, u, z, grad; storage is float32, bfloat16 or float16. Bytes moved: x and u of the parent in, out (and
x0_out) out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops import noise
from flowfast.ops._float32 import fma32
from flowfast.ops.checks import OperandError, check_latents, check_operand, check_range
from flowfast.ops.registry import register

A, B, C, G, D, E, D_FROM, E_FROM = range(8)  # columns of the schedule's table
COLUMNS = 8


def add_terms(coefficients: list[Tensor], operands: list[Tensor], dtype: torch.dtype) -> Tensor:
    """Sum of coefficient (R, 1) times operand (R, n), zero coefficients skipped; float64 tensors in and out.

    In the order and with the float32 roundings of the kernels, or for dtype float64 in plain float64 arithmetic.
    """
    total = torch.zeros_like(operands[0])
    for coefficient, operand in zip(coefficients, operands, strict=True):
        exact = dtype == torch.float64
        term = coefficient * operand + total if exact else fma32(coefficient, operand, total)
        total = torch.where(coefficient != 0, term, total)  # not a product with 0: the operand may be NaN
    return total


def reference(
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
    """Writes the children into `out` (and their parents' posterior means into `x0_out`).

    Args:
        x, u: (P, n) states and velocities of the parents, float32, bfloat16 or float16; called directly, float64 with a
            float64 table gives the ground truth for the same noise.
        parent, row: (R,) int64 row of x and of the table (its transition) for each lane; below 0: padding, its
            outputs stay untouched.
        key, candidate, chain: (R,) int64 address of the noise.
        table: (T, 8) float32, columns A, B, C, G, D, E, D_from, E_from.
        out: (R, n), of x's dtype; may be x itself where parent[i] == i for every lane that is not padding.
        x0_out, grad: (R, n), of x's dtype.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    _check(x, u, parent, row, key, candidate, chain, table, out, x0_out, grad)
    live = (parent >= 0) & (row >= 0)
    c = table[row.clamp(min=0)].double()[:, :, None].unbind(1)
    x_parent, u_parent = (latent[parent.clamp(min=0)].double() for latent in (x, u))
    z = torch.zeros_like(x_parent)
    if x.device.type != "cpu" or bool((c[C] != 0).any()):
        purpose = torch.where(row == 0, noise.INITIAL_NOISE, noise.TRANSITION)
        z = noise.normals(key, row, candidate, chain, purpose, x.size(1)).double()
    coefficients, operands = [c[A], c[B], c[C]], [x_parent, u_parent, z]
    if grad is not None:
        coefficients, operands = [*coefficients, c[G]], [*operands, grad.double()]
    child = add_terms(coefficients, operands, x.dtype).to(x.dtype)
    if x0_out is not None:
        x0 = add_terms([c[D_FROM], c[E_FROM]], [x_parent, u_parent], x.dtype).to(x.dtype)
        x0_out.copy_(torch.where(live[:, None], x0, x0_out))
    out.copy_(torch.where(live[:, None], child, out))


def _check(
    x: Tensor,
    u: Tensor,
    parent: Tensor,
    row: Tensor,
    key: Tensor,
    candidate: Tensor,
    chain: Tensor,
    table: Tensor,
    out: Tensor,
    x0_out: Tensor | None,
    grad: Tensor | None,
) -> None:
    op = "branch_step"
    check_latents(op, "x", x)
    parents, n = x.shape
    check_operand(op, "u", u, x.dtype, (parents, n), x.device)
    check_latents(op, "out", out)
    lanes = len(out)
    for name, latent in (("out", out), ("x0_out", x0_out), ("grad", grad)):
        if latent is not None:
            check_operand(op, name, latent, x.dtype, (lanes, n), x.device)
    check_operand(op, "parent", parent, torch.int64, (lanes,), x.device)
    check_operand(op, "row", row, torch.int64, (lanes,), x.device)
    live = (parent >= 0) & (row >= 0)
    noise.check_address(op, key, row, candidate, chain, live, lanes, n)
    check_table(op, table, x)
    check_range(op, "parent", parent, live, parents)
    check_range(op, "row", row, live, len(table))
    if n > 0 and out.data_ptr() == x.data_ptr() and x.device.type == "cpu":
        moved = live & (parent != torch.arange(lanes))
        if bool(moved.any()):
            raise OperandError(
                f"{op}: out may be x only where every lane is its own parent; lane {int(moved.nonzero()[0])} is not"
            )


def check_table(op: str, table: Tensor, x: Tensor) -> None:
    """The schedule's table is (T, 8) float32 (float64 beside float64 latents)."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    check_operand(op, "table", table, dtype, (table.size(0) if table.dim() else 0, COLUMNS), x.device)


register(
    "branch_step(Tensor x, Tensor u, Tensor parent, Tensor row, Tensor key, Tensor candidate, Tensor chain, "
    "Tensor table, Tensor(a!) out, Tensor(b!)? x0_out=None, Tensor? grad=None) -> ()",
    reference,
)
