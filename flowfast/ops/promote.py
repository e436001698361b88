"""Winners of a round into the stored rows, in place: store row i <- lane source[i] where source[i] >= 0.

Bytes moved, at least: 2 tensors x winners x n x (read + write).
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowfast.ops._backend import register
from flowfast.ops._checks import check_latents, check_operand, check_range


def reference(x_store: Tensor, u_store: Tensor, x_lane: Tensor, u_lane: Tensor, source: Tensor) -> None:
    """Writes `x_store` and `u_store`.

    Args:
        x_store, u_store: (P, n) latents and velocities of the parents, float32, bfloat16 or float16.
        x_lane, u_lane: (R, n) the same of the lanes, of the same dtype.
        source: (P,) int64 lane of the new parent, below R, or negative: the row is kept, its bytes untouched.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    check(x_store, u_store, x_lane, u_lane, source)
    if len(x_lane) == 0:
        return
    kept = (source < 0).unsqueeze(-1)
    lane = source.clamp(min=0)
    x_store.copy_(torch.where(kept, x_store, x_lane[lane]))
    u_store.copy_(torch.where(kept, u_store, u_lane[lane]))


def check(x_store: Tensor, u_store: Tensor, x_lane: Tensor, u_lane: Tensor, source: Tensor) -> None:
    op = "promote_"
    check_latents(op, "x_store", x_store)
    check_latents(op, "x_lane", x_lane)
    (rows, n), lanes = x_store.shape, len(x_lane)
    check_operand(op, "u_store", u_store, x_store.dtype, (rows, n), x_store.device)
    check_operand(op, "x_lane", x_lane, x_store.dtype, (lanes, n), x_store.device)
    check_operand(op, "u_lane", u_lane, x_store.dtype, (lanes, n), x_store.device)
    check_operand(op, "source", source, torch.int64, (rows,), x_store.device)
    check_range(op, "source", source, source >= 0, lanes)


register(
    "promote_(Tensor(a!) x_store, Tensor(b!) u_store, Tensor x_lane, Tensor u_lane, Tensor source) -> ()",
    reference,
)
