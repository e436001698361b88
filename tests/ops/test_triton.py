"""The Triton kernels in Triton's interpreter, in processes of their own, and the square root that PTX gets."""

import pytest
import torch
from triton_interpreter import passed, require

from flowfast.ops import noise
from flowfast.ops._float32 import fma32, round32


def test_kernels_have_the_bits_of_the_reference():
    require()
    assert passed("tests/ops/interpreted_kernels.py") > 100


FILES = ("branch_step", "gather_ancestors", "noise", "normalize_log_weights", "posterior_mean", "resample")
# Hundreds of programs, 20 ms each; interpreted_kernels.py has the same with fewer.
SLOW = ("equals_a_gather", "several_threads", "hard_bounds", "depend_on_the_batch", "in_float64", "shape1", "shape3")


@pytest.mark.slow  # 45 s; the test above holds the kernels to the reference, which passes these tests itself
def test_kernels_behave_as_every_backend_does():
    require()
    files = [f"tests/ops/test_{name}.py" for name in FILES]
    chosen = " and not ".join(("triton", *SLOW))
    twice = "tests/ops/test_resample.py::test_equals_the_reference"  # interpreted_kernels.py has it with fewer slots
    assert passed(*files, "-k", chosen, "--deselect", twice) > 150


def wrong_roots(corrections, lowest=1, highest=2**24):
    """How many pairs (a, y) end in a wrong root: a any argument of a root, y any float32 number as near to 1 / sqrt(a)
    as the PTX manual promises for rsqrt.approx. The steps are those of `square_root` in kernels/noise.py."""
    count = torch.arange(lowest, highest + 1).float()  # u 2^24
    bits = count.view(torch.int32)
    exponent = (bits - 0x4B2AAAAB) & -0x800000
    f = fma32(2.0**-24, (bits - exponent).view(torch.float32).double(), -1.0)
    whole = round32(exponent.double() * (noise._MINUS_2_LN_2 * 2.0**-23))
    a = fma32(f, noise._polynomial(noise._LOG, f), whole).unique()
    a = a[a > 0]  # 0 is exact: 0 times anything finite
    inverse, root = 1 / a.sqrt(), round32(a.sqrt())
    nearest, wrong = inverse.float().view(torch.int32), 0
    for units in range(-4, 5):
        y = (nearest + units).view(torch.float32).double()
        promised = (y - inverse).abs() <= inverse * 2.0**-22.9
        g = round32(a * y)
        for _ in range(corrections):
            g = fma32(round32(a - g * g), round32(y * 0.5), g)  # a - g * g is exact in float64
        wrong += int(((g != root) & promised).sum())
    return wrong


def test_square_root_is_correctly_rounded_whatever_the_approximation():
    pieces = [(lowest, lowest + 2**21 - 1) for lowest in range(1, 2**24 + 1, 2**21)]
    assert sum(wrong_roots(2, *piece) for piece in pieces) == 0
    assert sum(wrong_roots(0, *piece) for piece in pieces[:1]) > 0  # mutant: without a correction
