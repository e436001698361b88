"""fma32 against exact arithmetic (mpmath), on both of its ways."""

import math

import mpmath
import torch

from flowfast.ops._float32 import fma32


def exact_fma(a, b, c):
    with mpmath.workprec(24):
        values = [
            mpmath.fadd(mpmath.fmul(*pair, exact=True), z, rounding="n") for *pair, z in zip(a, b, c, strict=True)
        ]
    return torch.tensor([float(value) for value in values], dtype=torch.float64)


def operands(count):
    generator = torch.Generator().manual_seed(0)
    a, b, c = torch.randn(3, count, generator=generator)
    c[: count // 2] = -a[: count // 2] * b[: count // 2]  # cancellation: only the rounding error of the product is left
    c[count // 2 :] *= 2.0 ** torch.randint(-30, 30, (count - count // 2,), generator=generator)
    return a.double(), b.double(), c.double()


def test_random_operands():
    a, b, c = operands(1000)
    assert torch.equal(fma32(a, b, c), exact_fma(a.tolist(), b.tolist(), c.tolist()))


def test_ties_are_rounded_once():
    """One tie sends all elements the exact way, so that both ways are seen on the same operands."""
    product = torch.tensor([1 + 2.0**-12, 1 + 2.0**-12, 1 - 2.0**-12], dtype=torch.float64)
    small = torch.tensor([2.0**-60, -(2.0**-60), 2.0**-60], dtype=torch.float64)  # (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24
    a, b, c = (torch.cat(pair) for pair in zip((product, product, small), operands(1000), strict=True))
    expected = exact_fma(a.tolist(), b.tolist(), c.tolist())
    assert torch.equal(fma32(a, b, c), expected)
    mutant = (a * b + c).float().double()  # two roundings
    assert not torch.equal(mutant[:3], expected[:3]) and torch.equal(mutant[3:], expected[3:])


def test_fma_of_the_reference_keeps_infinity_and_nan_beside_a_tie():
    """One element on a tie sends all of them down the long way."""
    b = torch.tensor([1 + 2.0**-12, math.inf, -math.inf, math.nan, 3.0], dtype=torch.float64)
    found = fma32(1 + 2.0**-12, b, 0.0)
    assert found[:3].tolist() == [1 + 2.0**-11, math.inf, -math.inf]  # (1 + 2^-12)^2 is a tie; to even
    assert bool(found[3].isnan()) and found[4] == 3 + 3 * 2.0**-12
