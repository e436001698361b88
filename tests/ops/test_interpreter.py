"""The Triton kernels, in Triton's interpreter and in exact arithmetic.

TRITON_INTERPRET must be set before triton is imported, so the op tests that hold for every backend run once more in a
process of their own, where the fixture `backend` is "triton". What the interpreter cannot show, because only PTX has
it, is shown here in integers and float64: the square root.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowfast.ops import noise
from flowfast.ops._float32 import fma32, round32

ROOT = Path(__file__).resolve().parents[2]
HAS_TRITON = importlib.util.find_spec("triton") is not None
ELSEWHERE = pytest.mark.skipif(not HAS_TRITON, reason="triton has no wheel for this platform")
ENVIRONMENT = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "FLOWFAST_BACKEND": ""}
SCHEMES = """
import torch, flowfast.ops
for scheme in range(5):
    for slots, n in ((3, 1), (3, 2), (5, 16), (2, 41), (1, 123)):
        g = torch.Generator().manual_seed(n)
        weights = torch.softmax(3 * torch.randn(slots, n, generator=g, dtype=torch.float64), 1)
        weights[0, 0] = 0 if n > 1 else 1
        weights /= weights.sum(1, keepdim=True)
        key, row = torch.randint(-2**63, 2**63 - 1, (slots,), generator=g), torch.arange(slots)
        found = []
        for backend in ("triton", "reference"):
            with flowfast.ops.use_backend(backend):
                found.append(torch.full((slots, n), -7))
                on = torch.arange(slots) != 1
                torch.ops.flowfast.resample(weights, key, row, on, scheme, found[-1])
        assert torch.equal(*found), (scheme, n, found)
        assert n < 16 or not torch.equal(found[0], torch.arange(n).expand(slots, n))
"""
FILES = [
    ("noise", "branch_step"),
    ("posterior_mean", "promote", "rollover"),
    ("normalize_log_weights", "gather_ancestors"),
]


@ELSEWHERE
@pytest.mark.parametrize("files", FILES, ids="+".join)
def test_the_op_tests_hold_in_the_interpreter(files: tuple[str, ...]) -> None:
    slow = "tests/ops/test_gather_ancestors.py::test_equals_a_gather[triton]"  # 10,000 cases: minutes when interpreted
    argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", "--deselect", slow]
    argv += [f"tests/ops/test_{name}.py" for name in files]
    done = subprocess.run(argv, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout.splitlines()[-1]


@ELSEWHERE
def test_resampling_in_the_interpreter_chooses_the_same_ancestors() -> None:
    done = subprocess.run([sys.executable, "-c", SCHEMES], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]


def wrong_roots(corrections: int) -> int:
    """Wrongly rounded square roots among all numbers whose root a normal takes, with any y that PTX's rsqrt.approx may
    give (off by 2^-22.9 of itself) and so many corrections, as kernels/noise.py has them."""
    wrong = 0
    for first in range(1, 2**24 + 1, 2**21):
        count = torch.arange(first, min(first + 2**21, 2**24 + 1)).float()
        bits = count.view(torch.int32)
        exponent = (bits - 0x4B2AAAAB) & -0x800000
        f = fma32(2.0**-24, (bits - exponent).view(torch.float32).double(), -1.0)
        whole = round32(exponent.double() * (noise._MINUS_2_LN_2 * 2.0**-23))
        a = fma32(f, noise._polynomial(noise._LOG, f), whole).unique()
        a = a[a > 0]
        exact = 1 / a.sqrt()
        for ulps in range(-4, 5):
            y = (exact.float().view(torch.int32) + ulps).view(torch.float32).double()
            g = round32(a * y)
            for _ in range(corrections):
                g = fma32(round32(a - g * g), round32(y * 0.5), g)  # a - g^2 is exact in float64
            allowed = (y - exact).abs() <= exact * 2.0**-22.9
            wrong += int((allowed & (g != round32(a.sqrt()))).sum())
    return wrong


def test_the_square_root_is_correctly_rounded_and_one_correction_less_would_not_do() -> None:
    assert wrong_roots(2) == 0
    assert wrong_roots(1) == 1
