"""Addressed noise, stream version 1: a pure function of (key, purpose, row, candidate, chain, element).

    words    Philox4x32-10 (Salmon, Moraes, Dror, Shaw 2011), counter = (g, candidate, row | purpose << 28, chain)
    planar   word w of counter g = block * 64 + q is element block * 256 + w * 64 + q
    normal   Box-Muller on words (0, 1) and (2, 3): u = ((a >> 8) + 1) 2^-24, r = sqrt(-2 ln u),
             r cos(2 pi b / 2^32) and r sin(2 pi b / 2^32)
    uniform  ((word >> 9) + 1/2) 2^-23, in (0, 1)

row is one of the schedule's table: a transition's number. csrc/core/philox.h is the specification; this is the same in
PyTorch, to the last bit, on any device. Nothing here touches a global generator.
"""

from __future__ import annotations

import hashlib
import operator
from typing import SupportsIndex

import torch
from torch import Tensor

from flowfast.ops._float32 import fma32, round32
from flowfast.ops.checks import OperandError, check_latents, check_operand, check_range
from flowfast.ops.registry import register

STREAM_VERSION = 1
COUNTERS = 64  # counters of a block (Q)
BLOCK = 4 * COUNTERS  # elements of a block
MAX_ELEMENTS = BLOCK << 26  # 2^34 elements of a row have 2^32 counters
ROW_LIMIT = 1 << 28  # the four bits above hold the purpose

INITIAL_NOISE, TRANSITION, PROPOSAL_MOVE, RESAMPLING, SELECTION = range(5)
PURPOSES = 16

_MASK = 0xFFFFFFFF
# Coefficients of csrc/core/philox.h, highest power first; all are float32 numbers.
_LOG = (
    "0x1.4d817ap-2", "-0x1.61ef32p-2", "0x1.4c1aa8p-2", "-0x1.94cb36p-2",
    "0x1.003882p-1", "-0x1.5564f8p-1", "0x1.ffff1ap-1", "-0x1.fffff8p+0",
)  # fmt: skip
_COS = ("0x1.c2939ap-3", "-0x1.55020cp+0", "0x1.03bd9ap+2", "-0x1.3bd3bp+2", "0x1p+0")
_SIN = ("0x1.3912a8p-4", "-0x1.31fbf4p-1", "0x1.466504p+1", "-0x1.4abba2p+2", "0x1.921fb4p+1")
_MINUS_2_LN_2 = float.fromhex("-0x1.62e43p+0")


def noise_key(seed: SupportsIndex, prompt: str, repeat: SupportsIndex = 0) -> int:
    """The 64-bit key of a request's noise, as a signed integer: it depends on nothing but seed, prompt and repeat.

    The seed is any whole number, however large or below 0. What counts is its decimal text, so that a server which
    gets it as text has the same key: the first 8 bytes, little-endian, of BLAKE2b-64 of "seed NUL prompt NUL repeat".
    """
    text = f"{operator.index(seed)}\0{prompt}\0{operator.index(repeat)}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little", signed=True)


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four counter words and two key words (int64 tensors of 0..2^32-1, broadcast) to four words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap modulo 2^64, which keeps all 64 bits; the mask drops the sign that >> copies.
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return c0, c1, c2, c3


def _block_words(key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: Tensor | int, n: int) -> Tensor:
    """As `words`, in whole blocks: (R, blocks, 4, 64) int64, in element order once flattened to (R, -1)."""
    counters = torch.arange((n + BLOCK - 1) // BLOCK * COUNTERS, device=key.device)
    lane = [word[:, None] for word in (candidate & _MASK, row & (ROW_LIMIT - 1) | purpose << 28, chain & _MASK)]
    planes = philox((counters, *lane), (key[:, None] & _MASK, key[:, None] >> 32 & _MASK))
    return torch.stack([plane.expand(len(key), -1).unflatten(1, (-1, COUNTERS)) for plane in planes], dim=2)


def words(key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: Tensor | int, n: int) -> Tensor:
    """The words behind n elements of each lane.

    Args:
        key, row, candidate, chain: (R,) int64; key is a 64-bit pattern, the others fit their words.
        purpose: 0..15, one for all or (R,) int64.
        n: elements of a row.

    Returns:
        (R, n) int64 of 0..2^32-1, in element order.
    """
    return _block_words(key, row, candidate, chain, purpose, n).flatten(1)[:, :n]


def _polynomial(coefficients: tuple[str, ...], x: Tensor) -> Tensor:
    value: Tensor | float = float.fromhex(coefficients[0])
    for coefficient in coefficients[1:]:
        value = fma32(value, x, float.fromhex(coefficient))
    assert isinstance(value, Tensor)
    return value


def box_muller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Two standard normals from two words (int64 of 0..2^32-1), as float64 tensors of float32 values."""
    # u = 2^exponent m with m in [2/3, 4/3), so that the logarithm needs one polynomial in f = m - 1.
    count = ((a >> 8) + 1).float()
    bits = count.view(torch.int32)
    exponent = (bits - 0x4B2AAAAB) & -0x800000
    f = fma32(2.0**-24, (bits - exponent).view(torch.float32).double(), -1.0)
    whole = round32(exponent.double() * (_MINUS_2_LN_2 * 2.0**-23))
    square = fma32(f, _polynomial(_LOG, f), whole)
    # In float64: PyTorch's float32 sqrt may be off in the last bit (MKL). The root of a float32 number is at least
    # 2^-51 of itself away from a tie between two float32 numbers, so the last bit of float64 does not matter here.
    radius = round32(square.sqrt())

    # The turn b / 2^32 as a fraction s of a half turn in [-1/2, 1/2]; on the other half of the circle r changes sign.
    doubled = b << 1 & _MASK
    radius = torch.where((b ^ doubled) >> 31 == 1, -radius, radius)
    s = (doubled - (doubled >> 31 << 32)).float().double() * 2.0**-32
    s2 = round32(s * s)
    first = round32(radius * _polynomial(_COS, s2))
    second = round32(round32(radius * s) * _polynomial(_SIN, s2))
    return first, second


def normals(key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: Tensor | int, n: int) -> Tensor:
    """The addressed N(0, 1) noise: (R, n) float32. Arguments as in `words`."""
    blocks = _block_words(key, row, candidate, chain, purpose, n)
    first, second = box_muller(blocks[:, :, 0::2], blocks[:, :, 1::2])
    return torch.stack((first, second), dim=3).flatten(1)[:, :n].float()


def check_address(
    op: str, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, live: Tensor, lanes: int, n: int
) -> None:
    """The four address columns are (lanes,) int64 whose values fit their words on live lanes; n has counters enough."""
    if n > MAX_ELEMENTS:
        raise OperandError(f"{op}: a row may have at most 2^34 elements (the noise counter has 32 bits), got {n}")
    for name, column in (("key", key), ("row", row), ("candidate", candidate), ("chain", chain)):
        check_operand(op, name, column, torch.int64, (lanes,), key.device)
    check_range(op, "row", row, live, ROW_LIMIT)
    check_range(op, "candidate", candidate, live, 1 << 32)
    check_range(op, "chain", chain, live, 1 << 32)


def _check_fill(op: str, out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    check_latents(op, "out", out)
    check_operand(op, "key", key, torch.int64, (len(out),), out.device)
    check_address(op, key, row, candidate, chain, row >= 0, *out.shape)
    if not 0 <= purpose < PURPOSES:
        raise OperandError(f"{op}: purpose must lie in 0..15, got {purpose}")


def normal_reference(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    """Fills `out` (R, n) with addressed normals; rows with `row < 0` stay as they are.

    Args:
        out: (R, n) float32, bfloat16 or float16, contiguous; n <= 2^34.
        key, row, candidate, chain: (R,) int64. row < 2^28, candidate and chain < 2^32.
        purpose: 0 initial noise, 1 transition, 2 proposal move, 3 resampling, 4 selection.

    Raises:
        OperandError: an operand has a wrong dtype, shape, layout or value.
    """
    _check_fill("normal_", out, key, row, candidate, chain, purpose)
    z = normals(key, row, candidate, chain, purpose, out.size(1))
    out.copy_(torch.where((row >= 0)[:, None], z.to(out.dtype), out))


def uniform_reference(out: Tensor, key: Tensor, row: Tensor, candidate: Tensor, chain: Tensor, purpose: int) -> None:
    """Fills `out` (R, n) float32 with addressed uniforms in (0, 1); otherwise as `normal_reference`."""
    _check_fill("uniform_", out, key, row, candidate, chain, purpose)
    if out.dtype != torch.float32:
        raise OperandError(f"uniform_: out must have dtype torch.float32, got {out.dtype}")
    u = ((words(key, row, candidate, chain, purpose, out.size(1)) >> 9).float() + 0.5) * 2.0**-23
    out.copy_(torch.where((row >= 0)[:, None], u, out))


register(
    "normal_(Tensor(a!) out, Tensor key, Tensor row, Tensor candidate, Tensor chain, int purpose) -> ()",
    normal_reference,
)
register(
    "uniform_(Tensor(a!) out, Tensor key, Tensor row, Tensor candidate, Tensor chain, int purpose) -> ()",
    uniform_reference,
)
