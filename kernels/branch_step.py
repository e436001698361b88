"""One stochastic step of every lane from its parent, gather and noise included (arXiv 2503.19385 in its affine form).

    out[i]    = A x[p] + B u[p] + C z[i] + G grad[i]        p = parent[i], coefficients of table[row[i]]
    x0_out[i] = D_from x[p] + E_from u[p]

x, u: (P, n); parent, row, key, candidate, chain: (R,) int64; table: (T, 8) float32; out, x0_out, grad: (R, n). Storage
is float32, bfloat16 or float16, arithmetic float32 with one fma a term in the order x, u, z, grad: the bits of the
reference. Everything that may change between replays of a captured graph is read from device memory. Bytes moved: x and
u of the parent in, out and x0_out out; nothing else, no shared memory and no barrier.
"""

from typing import Optional

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import cut, element_offset, in_use, iota, is_nvidia, narrow, warp_size, widen
from flowfast.kernels.noise import BLOCK, COUNTERS, block_offsets, box_muller, fma, key_words, philox, row_word


@triton.jit
def _read(ptr, coefficient, mask, PTX: tl.constexpr, PLAIN: tl.constexpr):
    """Operand of a term, not touched where the coefficient is 0."""
    if not PLAIN:
        mask = mask & in_use(coefficient, mask.shape)
    return widen(tl.load(ptr, mask=mask), PTX)


@triton.jit
def _add(coefficient, operand, total, PLAIN: tl.constexpr):
    added = fma(coefficient, operand, total)
    return added if PLAIN else tl.where(in_use(coefficient, total.shape), added, total)


@triton.jit
def _combine(
    x, u, z, grad, out, x0_out, a, b, c, g, d_from, e_from, offsets, left,
    EVEN: tl.constexpr, PTX: tl.constexpr, PLAIN: tl.constexpr,
):  # fmt: skip
    """The terms and the stores of one chunk. PLAIN: no coefficient in use is 0."""
    for w in tl.static_range(4):
        where = offsets + w * COUNTERS
        mask = None if EVEN and PLAIN else where < left
        x_w = _read(x + where, a, mask, PTX, PLAIN)
        u_w = _read(u + where, b, mask, PTX, PLAIN)
        zero = tl.zeros(where.shape, tl.float32)
        total = _add(c, z[w], _add(b, u_w, _add(a, x_w, zero, PLAIN), PLAIN), PLAIN)
        if grad is not None:
            total = _add(g, _read(grad + where, g, mask, PTX, PLAIN), total, PLAIN)
        if x0_out is not None:
            if not PLAIN:  # a term of the mean may have a coefficient where that of the child has none
                x_w = _read(x + where, d_from, mask, PTX, PLAIN)
                u_w = _read(u + where, e_from, mask, PTX, PLAIN)
            mean = _add(e_from, u_w, _add(d_from, x_w, zero, PLAIN), PLAIN)
            tl.store(x0_out + where, narrow(mean, x0_out, PTX), mask=mask)
        tl.store(out + where, narrow(total, out, PTX), mask=mask)  # last: out may be x


@triton.jit
def _branch_step_kernel(
    x_ptr, u_ptr, parent_ptr, row_ptr, key_ptr, candidate_ptr, chain_ptr, table_ptr, out_ptr, x0_out_ptr, grad_ptr,
    iota_ptr, n, run, BLOCKS: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    parent = tl.load(parent_ptr + lane)
    row = tl.load(row_ptr + lane)
    if (parent < 0) | (row < 0):
        return
    k0, k1 = key_words(tl.load(key_ptr + lane))
    candidate = tl.load(candidate_ptr + lane).to(tl.uint32)
    chain = tl.load(chain_ptr + lane).to(tl.uint32)
    word = row_word(row, (row != 0).to(tl.uint32))  # purpose 0, initial noise, or 1, transition
    coefficients = table_ptr + row * 8
    a, b, c = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
    g, d_from, e_from = tl.load(coefficients + 3), tl.load(coefficients + 6), tl.load(coefficients + 7)
    plain = (a != 0) & (b != 0) & (c != 0)
    if grad_ptr is not None:
        plain = plain & (g != 0)
    if x0_out_ptr is not None:
        plain = plain & (d_from != 0) & (e_from != 0)

    # Loaded rather than made by arange: a load fixes how counters are spread over threads, so that the compiler makes
    # the noise where the latents' wide loads and stores need it instead of moving it there through shared memory.
    q = tl.load(iota_ptr + tl.arange(0, BLOCKS * COUNTERS))
    offsets = block_offsets(BLOCKS)
    first = tl.program_id(1) * run
    for i in range(run):
        chunk = first + i
        start = chunk.to(tl.int64) * (BLOCKS * BLOCK)
        left = tl.minimum(n - start, BLOCKS * BLOCK).to(tl.int32)
        source = element_offset(parent, n, start)
        target = element_offset(lane, n, start)
        grad = None if grad_ptr is None else grad_ptr + target
        x0_out = None if x0_out_ptr is None else x0_out_ptr + target
        counter = (q + chunk * (BLOCKS * COUNTERS)).to(tl.uint32)
        if plain:
            z0, z1, z2, z3 = philox(counter, candidate, word, chain, k0, k1)
            z0, z1 = box_muller(z0, z1, PTX)
            z2, z3 = box_muller(z2, z3, PTX)
            _combine(
                x_ptr + source, u_ptr + source, (z0, z1, z2, z3), grad, out_ptr + target, x0_out,
                a, b, c, g, d_from, e_from, offsets, left, EVEN, PTX, True,
            )  # fmt: skip
        else:
            z0 = tl.zeros(counter.shape, tl.float32)
            z1, z2, z3 = z0, z0, z0
            # Read again: kept across the loop with what follows from them, they would crowd out registers of the above.
            a, b, c = tl.load(coefficients), tl.load(coefficients + 1), tl.load(coefficients + 2)
            g, d_from, e_from = tl.load(coefficients + 3), tl.load(coefficients + 6), tl.load(coefficients + 7)
            if c != 0:
                w0, w1, w2, w3 = philox(counter, candidate, word, chain, k0, k1)
                z0, z1 = box_muller(w0, w1, PTX)
                z2, z3 = box_muller(w2, w3, PTX)
            _combine(
                x_ptr + source, u_ptr + source, (z0, z1, z2, z3), grad, out_ptr + target, x0_out,
                a, b, c, g, d_from, e_from, offsets, left, EVEN, PTX, False,
            )  # fmt: skip


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
    x0_out: Optional[Tensor] = None,
    grad: Optional[Tensor] = None,
) -> None:
    """Launches the kernel; operands as the reference checks them."""
    lanes, n = out.shape
    if lanes == 0 or n == 0:
        return
    blocks = warp_size() // 8
    chunk = blocks * BLOCK.value
    grid, run = cut(lanes, n, chunk, x.device)
    _branch_step_kernel[grid](
        x, u, parent, row, key, candidate, chain, table, out, x0_out, grad,
        iota(x.device, blocks * COUNTERS.value), n, run,
        BLOCKS=blocks, EVEN=n % (chunk * run) == 0, PTX=is_nvidia(), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip
