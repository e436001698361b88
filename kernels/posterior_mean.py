"""Classifier-free guidance and the posterior mean (Tweedie) after a model evaluation.

    u_out[i]  = u_uncond[i] + guidance[i] (u[i] - u_uncond[i])      without u_uncond: u[i]
    x0_out[i] = D x[i] + E u_out[i]                                 coefficients of table[row[i]]

x, u, u_uncond, u_out, x0_out: (R, n) float32, bfloat16 or float16; guidance: (R,) float32; row: (R,) int64; table:
(T, 8) float32; broken: (R,) bool. Arithmetic is float32 in the order and with the roundings of the reference, so the
bits are the same; u_out enters x0_out before it is rounded to the storage type. Lanes whose x0_out is not finite are
marked in broken: each thread keeps the largest magnitude it has stored, so nothing goes through shared memory. Bytes
moved: x, u, u_uncond in, u_out, where there is one, and x0_out out.
"""

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import cut, element_offset, in_use, is_nvidia, narrow, warp_size, widen
from flowfast.kernels.noise import fma

CHUNK = 2048  # elements: 16 a thread of 4 warps (8 where a warp has 64), 128 bits of bfloat16 at a time


@triton.jit
def _first_infinite(ptr):
    """Bits of the smallest float32 magnitude that the type that ptr stores does not hold as a finite number."""
    if ptr.dtype.element_ty == tl.bfloat16:
        bits = 0x7F7F8000
    elif ptr.dtype.element_ty == tl.float16:
        bits = 0x477FF000
    else:
        bits = 0x7F800000
    return bits


@triton.jit
def _mean_chunk(
    x, u, uncond, u_out, x0_out, w, d, e, mask,
    PTX: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """One chunk; its means in float32. PLAIN: guidance is neither 0 nor 1, d and e are not 0."""
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
    if u_out is not None:
        tl.store(u_out, narrow(guided, u_out, PTX), mask=mask)
    tl.store(x0_out, narrow(mean, x0_out, PTX), mask=mask)
    return mean


@triton.jit
def _worst(mean, mask, worst, THREADS: tl.constexpr, WIDTH: tl.constexpr):
    """Largest magnitude, as bits, that a thread has met: a NaN is above infinity."""
    magnitude = mean.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    if mask is not None:
        magnitude = tl.where(mask, magnitude, 0)
    # Cut as a wide store cuts it, so that both maxima stay within a thread.
    magnitude = tl.reshape(magnitude, (magnitude.shape[0] // (THREADS * WIDTH), THREADS, WIDTH))
    return tl.maximum(worst, tl.max(tl.max(magnitude, 2), 0))


@triton.jit
def _posterior_mean_kernel(
    x_ptr, u_ptr, uncond_ptr, guidance_ptr, row_ptr, table_ptr, u_out_ptr, x0_out_ptr, broken_ptr, n, run,
    CHUNK: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr, THREADS: tl.constexpr,
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
    worst = tl.zeros((THREADS,), tl.int32)
    WIDTH: tl.constexpr = 128 // x0_out_ptr.dtype.element_ty.primitive_bitwidth
    first = tl.program_id(1) * run
    for i in range(run):
        start = element_offset(first + i, CHUNK, 0)
        at = element_offset(lane, n, start)
        x, u, x0_out = x_ptr + at + offsets, u_ptr + at + offsets, x0_out_ptr + at + offsets
        uncond = None if uncond_ptr is None else uncond_ptr + at + offsets
        u_out = None if u_out_ptr is None else u_out_ptr + at + offsets
        mask = offsets < n - start
        if plain:
            mean = _mean_chunk(x, u, uncond, u_out, x0_out, w, d, e, None if EVEN else mask, PTX, True)
        else:
            mean = _mean_chunk(x, u, uncond, u_out, x0_out, w, d, e, mask, PTX, False)
        if broken_ptr is not None:
            worst = _worst(mean, None if EVEN else mask, worst, THREADS, WIDTH)
    if broken_ptr is not None:
        # Each thread that has met one says so: they write the same.
        mark = broken_ptr + lane + tl.zeros((THREADS,), tl.int32)
        tl.store(mark, True, mask=worst >= _first_infinite(x0_out_ptr))


def posterior_mean(
    x: Tensor,
    u: Tensor,
    u_uncond: Optional[Tensor],
    guidance: Optional[Tensor],
    row: Tensor,
    table: Tensor,
    u_out: Optional[Tensor],
    x0_out: Tensor,
    broken: Optional[Tensor] = None,
) -> None:
    """Launches the kernel; operands as the reference checks them."""
    lanes, n = x.shape
    if lanes == 0 or n == 0:
        return
    grid, run = cut(lanes, n, CHUNK, x.device)
    _posterior_mean_kernel[grid](
        x, u, u_uncond, guidance, row, table, u_out, x0_out, broken, n, run, CHUNK=CHUNK,
        EVEN=n % (CHUNK * run) == 0, PTX=is_nvidia(), THREADS=4 * warp_size(), num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
