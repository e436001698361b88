"""In-place ancestor gather: row i <- row ancestors[i], where every survivor keeps its row.

x, u: (P, n) float32, bfloat16 or float16; ancestors: (P,) int64 with ancestors[ancestors[i]] = ancestors[i] (Murray,
Lee, Jacob, arXiv 1301.4019), so that only rows nobody reads are written: one launch, no race, no second buffer. Bytes
moved: 2 tensors x dead rows x n x (read + write).
"""

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import copy_row, cut, element_offset

CHUNK = 2048  # elements


@triton.jit
def _gather_ancestors_kernel(x_ptr, u_ptr, ancestors_ptr, n, run, CHUNK: tl.constexpr, EVEN: tl.constexpr):
    slot = tl.program_id(0).to(tl.int64)
    ancestor = tl.load(ancestors_ptr + slot)
    if ancestor == slot:
        return
    source, target = element_offset(ancestor, n, 0), element_offset(slot, n, 0)
    first = tl.program_id(1) * run
    copy_row(x_ptr + source, x_ptr + target, n, first, run, CHUNK, EVEN)
    copy_row(u_ptr + source, u_ptr + target, n, first, run, CHUNK, EVEN)


def gather_ancestors_(x: Tensor, u: Tensor, ancestors: Tensor) -> None:
    """Launches the kernel; operands as the reference checks them."""
    rows, n = x.shape
    if rows == 0 or n == 0:
        return
    grid, run = cut(rows, n, CHUNK, x.device)
    _gather_ancestors_kernel[grid](x, u, ancestors, n, run, CHUNK=CHUNK, EVEN=n % (CHUNK * run) == 0, num_warps=4)
