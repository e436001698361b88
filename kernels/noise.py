"""Addressed noise, stream version 1, in Triton: the device functions that other kernels use, `normal_` and `uniform_`.

`csrc/core/philox.h` is the specification and `flowfast/ops/noise.py` the same in PyTorch; words and normals are equal
to theirs to the last bit. One block of 256 elements has 64 counters, word w of counter q belongs to element w * 64 + q:
a thread that owns 8 neighbouring counters owns four runs of 8 neighbouring elements, so nothing has to be moved between
threads and every access to bfloat16 latents is 128 bits wide. Bytes moved: the output.
"""

import triton
import triton.language as tl
from torch import Tensor

from flowfast.kernels._rows import cut, element_offset, iota, is_nvidia, narrow, warp_size

COUNTERS: tl.constexpr = tl.constexpr(64)
BLOCK: tl.constexpr = tl.constexpr(256)


def _floats(*numbers: str) -> tl.constexpr:
    return tl.constexpr(tuple(float.fromhex(number) for number in numbers))


# Polynomials of csrc/core/philox.h, highest power first; all coefficients are float32 numbers.
_LOG: tl.constexpr = _floats(
    "0x1.4d817ap-2", "-0x1.61ef32p-2", "0x1.4c1aa8p-2", "-0x1.94cb36p-2",
    "0x1.003882p-1", "-0x1.5564f8p-1", "0x1.ffff1ap-1", "-0x1.fffff8p+0",
)  # fmt: skip
_COS: tl.constexpr = _floats("0x1.c2939ap-3", "-0x1.55020cp+0", "0x1.03bd9ap+2", "-0x1.3bd3bp+2", "0x1p+0")
_SIN: tl.constexpr = _floats("0x1.3912a8p-4", "-0x1.31fbf4p-1", "0x1.466504p+1", "-0x1.4abba2p+2", "0x1.921fb4p+1")
_MINUS_2_LN_2: tl.constexpr = tl.constexpr(float.fromhex("-0x1.62e43p-23"))  # times 2^-23: the exponent is in place
_2_M23: tl.constexpr = tl.constexpr(2.0**-23)
_2_M24: tl.constexpr = tl.constexpr(2.0**-24)
_2_M32: tl.constexpr = tl.constexpr(2.0**-32)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox4x32-10 (Salmon et al. 2011) on uint32 counters and keys."""
    for _ in tl.static_range(10):
        p0 = c0.to(tl.uint64) * 0xD2511F53  # one wide multiplication gives both halves
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c1 = p1.to(tl.uint32)
        c3 = p0.to(tl.uint32)
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def fma(a, b, c):
    """float32 a * b + c with one rounding, whatever the compiler is allowed to contract."""
    return tl.math.fma(a, b, c)


@triton.jit
def polynomial(x, COEFFICIENTS: tl.constexpr, DEGREE: tl.constexpr):
    value = fma(COEFFICIENTS[0], x, COEFFICIENTS[1])
    for i in tl.static_range(2, DEGREE + 1):
        value = fma(value, x, COEFFICIENTS[i])
    return value


@triton.jit
def square_root(a, PTX: tl.constexpr):
    """Correctly rounded root of 0 or of a number in [1e-7, 34]: of what -2 ln u can be.

    PTX's own sqrt.rn spends half of its instructions on numbers outside this range. What is left: an approximate
    1 / sqrt(a), off by at most 2^-22.9 of itself (PTX manual), and two corrections with the exact remainder a - g^2
    (Markstein 1990). tests/ops/test_triton.py shows that the result is correctly rounded for each a that a
    normal needs and each y that the manual allows; with one correction a single a might not be.
    """
    if PTX:
        y = tl.inline_asm_elementwise("rsqrt.approx.ftz.f32 $0, $1;", "=r,r", [a], tl.float32, True, 1)
        y = tl.minimum(y, 1e18)  # a = 0
        g = a * y
        g = fma(fma(-g, g, a), y * 0.5, g)
        root = fma(fma(-g, g, a), y * 0.5, g)
    else:
        root = tl.math.sqrt_rn(a)
    return root


@triton.jit
def box_muller(a, b, PTX: tl.constexpr):
    """Two standard normals from two words."""
    count = ((a >> 8) + 1).to(tl.int32).to(tl.float32).to(tl.int32, bitcast=True)  # u 2^24, exact
    exponent = (count - 0x4B2AAAAB) & -0x800000  # u = 2^e m, m in [2/3, 4/3)
    f = fma((count - exponent).to(tl.float32, bitcast=True), _2_M24, -1.0)
    whole = exponent.to(tl.float32) * _MINUS_2_LN_2
    r = square_root(fma(f, polynomial(f, _LOG, 7), whole), PTX)
    # The turn is halved: s is the part of a half turn nearest to zero, and r changes sign on the other half of the
    # circle, where the two top bits of b differ; that is the top bit of b + 2^30.
    r = (r.to(tl.uint32, bitcast=True) ^ ((b + 0x40000000) & 0x80000000)).to(tl.float32, bitcast=True)
    s = (b << 1).to(tl.int32, bitcast=True).to(tl.float32) * _2_M32
    s2 = s * s
    return r * polynomial(s2, _COS, 4), (r * s) * polynomial(s2, _SIN, 4)


@triton.jit
def key_words(key):
    return key.to(tl.uint32), (key >> 32).to(tl.uint32)


@triton.jit
def row_word(row, purpose):
    return row.to(tl.uint32) | (purpose << 28).to(tl.uint32)


@triton.jit
def block_offsets(BLOCKS: tl.constexpr):
    """Element of word 0 of each counter of BLOCKS blocks; words 1, 2, 3 are 64, 128, 192 elements further."""
    q = tl.arange(0, BLOCKS * COUNTERS)
    return q // COUNTERS * BLOCK + q % COUNTERS


@triton.jit
def uniform(word):
    """A word as a number in (0, 1)."""
    return fma((word >> 9).to(tl.int32).to(tl.float32), _2_M23, _2_M24)


@triton.jit(do_not_specialize=["purpose"])  # a 1 would become a constant without a type
def _noise_kernel(
    out_ptr, key_ptr, row_ptr, candidate_ptr, chain_ptr, iota_ptr, n, run, purpose,
    NORMAL: tl.constexpr, BLOCKS: tl.constexpr, EVEN: tl.constexpr, PTX: tl.constexpr,
):  # fmt: skip
    lane = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + lane)
    if row < 0:
        return
    k0, k1 = key_words(tl.load(key_ptr + lane))
    candidate = tl.load(candidate_ptr + lane).to(tl.uint32)
    chain = tl.load(chain_ptr + lane).to(tl.uint32)
    word = row_word(row, purpose)
    q = tl.load(iota_ptr + tl.arange(0, BLOCKS * COUNTERS))
    offsets = block_offsets(BLOCKS)
    first = tl.program_id(1) * run
    for i in range(run):
        chunk = first + i
        start = chunk.to(tl.int64) * (BLOCKS * BLOCK)
        counter = (q + chunk * (BLOCKS * COUNTERS)).to(tl.uint32)
        z0, z1, z2, z3 = philox(counter, candidate, word, chain, k0, k1)
        if NORMAL:
            z0, z1 = box_muller(z0, z1, PTX)
            z2, z3 = box_muller(z2, z3, PTX)
        else:
            z0, z1, z2, z3 = uniform(z0), uniform(z1), uniform(z2), uniform(z3)
        z = (z0, z1, z2, z3)
        out = out_ptr + element_offset(lane, n, start)
        left = tl.minimum(n - start, BLOCKS * BLOCK).to(tl.int32)
        for w in tl.static_range(4):
            where = offsets + w * COUNTERS
            mask = None if EVEN else where < left
            tl.store(out + where, narrow(z[w], out_ptr, PTX), mask=mask)


def _fill(normal: bool, out: Tensor, columns: tuple[Tensor, ...], purpose: int) -> None:
    lanes, n = out.shape
    if lanes == 0 or n == 0:
        return
    blocks = warp_size() // 8
    chunk = blocks * BLOCK.value
    grid, run = cut(lanes, n, chunk, out.device)
    _noise_kernel[grid](
        out, *columns, iota(out.device, blocks * COUNTERS.value), n, run, purpose,
        NORMAL=normal, BLOCKS=blocks, EVEN=n % (chunk * run) == 0, PTX=is_nvidia(), num_warps=1, enable_fp_fusion=False,
    )  # fmt: skip


def normal_(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    """Fills `out` (R, n) float32, bfloat16 or float16 with addressed normals; operands as the reference checks them."""
    _fill(True, out, (key, row, candidate, chain), purpose)


def uniform_(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    """Fills `out` (R, n) float32 with addressed uniforms in (0, 1)."""
    _fill(False, out, (key, row, candidate, chain), purpose)
