"""The addressed normals alone, for each instruction set that runs here, beside torch.randn and the PyTorch reference.

    python -m bench noise

One row of float32 numbers (1 MiB) into the same buffer, so what counts is the generator and not memory. The batch is
1; `ns_a_normal` is ours_ms over the elements. Checked before it is timed: all of ours give the same bits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from bench.timing import FLUX, Suite, paired
from flowfast import ops
from flowfast.errors import OptionError


@pytest.mark.parametrize("instruction_set", ["scalar", "avx2", "avx512"])
def test_noise(benchmark: Any, suite: Suite, instruction_set: str) -> None:
    shape = (64, 64) if suite.options.quick else FLUX
    n = shape[0] * shape[1]
    out, lane = torch.empty(1, n), torch.zeros(1, dtype=torch.int64)
    expected, plain = torch.empty_like(out), torch.empty_like(out)
    ops.noise.normal_reference(expected, lane, lane, lane, lane, 1)
    candidates: dict[str, Callable[[], object]] = {
        "ours": lambda: torch.ops.flowfast.normal_(out, lane, lane, lane, lane, 1),
        "randn": lambda: torch.randn(n, out=plain[0]),
        "reference": lambda: ops.noise.normal_reference(plain, lane, lane, lane, lane, 1),
    }
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(ops.use_instruction_set(instruction_set))
        except OptionError as error:
            suite.leave_out("noise", instruction_set, str(error))
            return
        candidates["ours"]()
        assert torch.equal(out, expected), f"{instruction_set} differs from the reference"
        times = paired(benchmark, candidates, suite.options.turns(21))
        for peer in ("randn", "reference"):
            suite.row(
                "noise", batch=1, shape=shape, dtype=torch.float32, ours=times["ours"], peer=peer, theirs=times[peer],
                bytes=4 * n, ns_a_normal=1e6 * times["ours"].median / n,
            )  # fmt: skip
