"""Winners of a round into the stored rows, in place: store row i <- lane source[i] where source[i] >= 0.

x_store, u_store: (P, n), x_lane, u_lane: (R, n), float32, bfloat16 or float16; source: (P,) int64. Bytes moved: 2
tensors x winners x n x (read + write).
"""

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import copy_row, cut, element_offset

CHUNK = 2048  # elements


@triton.jit
def _promote_kernel(
    x_store_ptr, u_store_ptr, x_lane_ptr, u_lane_ptr, source_ptr, n, run, CHUNK: tl.constexpr, EVEN: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.load(source_ptr + row)
    if lane < 0:
        return
    source, target = element_offset(lane, n, 0), element_offset(row, n, 0)
    first = tl.program_id(1) * run
    copy_row(x_lane_ptr + source, x_store_ptr + target, n, first, run, CHUNK, EVEN)
    copy_row(u_lane_ptr + source, u_store_ptr + target, n, first, run, CHUNK, EVEN)


def promote_(x_store: Tensor, u_store: Tensor, x_lane: Tensor, u_lane: Tensor, source: Tensor) -> None:
    """Launches the kernel; operands as the reference checks them."""
    rows, n = x_store.shape
    if rows == 0 or n == 0 or len(x_lane) == 0:
        return
    grid, run = cut(rows, n, CHUNK, x_store.device)
    _promote_kernel[grid](
        x_store, u_store, x_lane, u_lane, source, n, run, CHUNK=CHUNK, EVEN=n % (CHUNK * run) == 0, num_warps=4
    )
