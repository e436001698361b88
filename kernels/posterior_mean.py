"""Classifier-free guidance and the posterior mean (Tweedie) after a model evaluation.

    u_out[i]  = u_uncond[i] + guidance[i] (u[i] - u_uncond[i])      without u_uncond: u[i]
    x0_out[i] = D x[i] + E u_out[i]                                 coefficients of table[row[i]]

x, u, u_uncond, u_out, x0_out: (R, n) float32, bfloat16 or float16; guidance: (R,) float32; row: (R,) int64; table:
(T, 8) float32. Arithmetic is float32 in the order and with the roundings of the reference, so the bits are the same;
u_out enters x0_out before it is rounded to the storage type. Bytes moved: x, u, u_uncond in, u_out and x0_out out.
"""

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import cut, element_offset, in_use, is_nvidia, narrow, widen
from flowfast.kernels.noise import fma

CHUNK = 2048  # elements: 16 a thread of 4 warps (8 where a warp has 64), 128 bits of bfloat16 at a time


@triton.jit
def _mean_chunk(
    x, u, uncond, u_out, x0_out, w, d, e, mask,
    PTX: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One chunk. PLAIN: guidance is neither 0 nor 1, d and e are not 0."""
    mask_u, mask_uncond, mask_x = mask, mask, mask
    if not PLAIN:
        mask_x = mask & in_use(d, mask.shape)
        if uncond is not None:
            mask_u = mask & in_use(w, mask.shape)
            mask_uncond = mask & in_use(w - 1, mask.shape)
    guided = widen(tl.load(u, mask=mask_u), PTX)
    if uncond is not None:
        base = widen(tl.load(uncond, mask=mask_uncond), PTX)
        mixed = fma(w, guided - base, base)
        if not PLAIN:
            mixed = tl.where(in_use(w, mask.shape), tl.where(in_use(w - 1, mask.shape), mixed, guided), base)
        guided = mixed
    x_wide = widen(tl.load(x, mask=mask_x), PTX)
    zero = tl.zeros(x_wide.shape, tl.float32)
    mean = fma(d, x_wide, zero)
    if PLAIN:
        mean = fma(e, guided, mean)
    else:
        mean = tl.where(in_use(d, mask.shape), mean, zero)
        mean = tl.where(in_use(e, mask.shape), fma(e, guided, mean), mean)
    tl.store(u_out, narrow(guided, u_out, PTX), mask=mask)
    tl.store(x0_out, narrow(mean, x0_out, PTX), mask=mask)


@triton.jit
def _posterior_mean_kernel(
    x_ptr, u_ptr, uncond_ptr, guidance_ptr, row_ptr, table_ptr, u_out_ptr, x0_out_ptr, n, run,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + lane)
    if row < 0:
        return
    d, e = tl.load(table_ptr + row * 8 + 4), tl.load(table_ptr + row * 8 + 5)
    plain = (d != 0) & (e != 0)
    w = d  # not used without u_uncond
    if uncond_ptr is not None:
        w = tl.load(guidance_ptr + lane)
        plain = plain & (w != 0) & (w != 1)
    offsets = tl.arange(0, CHUNK)
    first = tl.program_id(1) * run
    for i in range(run):
        start = element_offset(first + i, CHUNK, 0)
        at = element_offset(lane, n, start)
        x, u, u_out, x0_out = x_ptr + at, u_ptr + at, u_out_ptr + at, x0_out_ptr + at
        uncond = None if uncond_ptr is None else uncond_ptr + at + offsets
        mask = offsets < n - start
        if plain:
            _mean_chunk(
                x + offsets, u + offsets, uncond, u_out + offsets, x0_out + offsets, w, d, e,
                None if EVEN else mask, PTX, True,
            )  # fmt: skip
        else:
            _mean_chunk(x + offsets, u + offsets, uncond, u_out + offsets, x0_out + offsets, w, d, e, mask, PTX, False)


def posterior_mean(
    x: Tensor,
    u: Tensor,
    u_uncond: Optional[Tensor],
    guidance: Optional[Tensor],
    row: Tensor,
    table: Tensor,
    u_out: Tensor,
    x0_out: Tensor,
) -> None:
    """Launches the kernel; operands as the reference checks them."""
    lanes, n = x.shape
    if lanes == 0 or n == 0:
        return
    grid, run = cut(lanes, n, CHUNK, x.device)
    _posterior_mean_kernel[grid](
        x, u, u_uncond, guidance, row, table, u_out, x0_out, n, run,
        CHUNK=CHUNK, EVEN=n % (CHUNK * run) == 0, PTX=is_nvidia(), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
