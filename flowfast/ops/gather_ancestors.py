"""In-place ancestor gather: row i <- row ancestors[i], where every survivor keeps its row.

With a[i] = i wherever row i is anyone's ancestor (Murray, Lee, Jacob, arXiv 1301.4019) only rows that nobody reads are
written: no race, no second buffer. Bytes moved, at least: 2 tensors x dead rows x n x (read + write).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops.checks import OperandError, check_latents, check_operand, check_range
from flowfast.ops.registry import register


def reference(x: Tensor, u: Tensor, ancestors: Tensor) -> None:
    """Writes the dead rows of `x` and `u`.

    Args:
        x, u: (P, n) latents and velocities, float32, bfloat16 or float16.
        ancestors: (P,) int64 rows in 0..P-1 with ancestors[ancestors[i]] = ancestors[i], as `resample` gives them (plus
            the first row of the slot). Values are checked on the CPU only: on a device that would make the host wait.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    check(x, u, ancestors)
    x.copy_(x[ancestors])
    u.copy_(u[ancestors])


def check(x: Tensor, u: Tensor, ancestors: Tensor) -> None:
    op = "gather_ancestors_"
    check_latents(op, "x", x)
    check_operand(op, "u", u, x.dtype, tuple(x.shape), x.device)
    check_operand(op, "ancestors", ancestors, torch.int64, (len(x),), x.device)
    check_range(op, "ancestors", ancestors, torch.ones_like(ancestors, dtype=torch.bool), len(x))
    if ancestors.device.type == "cpu" and not torch.equal(ancestors[ancestors], ancestors):
        raise OperandError(f"{op}: an ancestor must keep its own row; permute the ancestors as resample does")


register("gather_ancestors_(Tensor(a!) x, Tensor(b!) u, Tensor ancestors) -> ()", reference)
