"""One stochastic step with posterior mean, x' = A x + B u + C z and x0_hat = D x + E u, on latents of FLUX.

    python -m bench step_x0

Peers: `eager` PyTorch, `compile` (torch.compile with eager's random numbers), `randn` (torch.randn_like alone, nothing
else), and for bfloat16 `float32`, our own step on float32 latents. `generator_share`: the time of the step's normals
alone (same generator, one buffer that stays in cache) over that of the step; 1 would be the generator's roofline.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import FLUX, Suite, compiled, paired

A, B, C, D, E = 1.02, -0.07, 0.13, 1.0, -0.9
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.05}


def eager(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return A * x + B * u + C * torch.randn_like(x), D * x + E * u


def fused(x: Tensor, u: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    lanes = torch.arange(len(x))
    zeros = torch.zeros_like(lanes)
    coefficients = torch.tensor([[0.0] * 8, [A, B, C, 0.0, D, E, D, E]])
    out, x0_out = torch.empty_like(x), torch.empty_like(x)

    def run() -> tuple[Tensor, Tensor]:
        torch.ops.flowfast.branch_step(x, u, lanes, zeros + 1, zeros + 7, lanes, zeros, coefficients, out, x0_out)
        return out, x0_out

    return run


def generator_alone(rows: int, n: int) -> Callable[[], None]:
    out, lane = torch.empty(1, n), torch.zeros(1, dtype=torch.int64)

    def run() -> None:
        for _ in range(rows):
            torch.ops.flowfast.normal_(out, lane, lane, lane, lane, 1)

    return run


def check(run: Callable[[], tuple[Tensor, Tensor]], x: Tensor, u: Tensor) -> None:
    """The noise in the result is standard normal and the rest of it is the formula."""
    out, x0 = (tensor.double() for tensor in run())
    tolerance = TOLERANCE[x.dtype]
    x, u = x.double(), u.double()
    z = (out - A * x - B * u) / C
    torch.testing.assert_close(x0, D * x + E * u, rtol=0, atol=tolerance * 4)
    assert abs(float(z.mean())) < 4.9 / z.numel() ** 0.5 + tolerance, "mean of the noise"
    assert abs(float(z.var()) - 1) < 4.9 * (2 / z.numel()) ** 0.5 + tolerance, "variance of the noise"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("batch", [1, 8])
def test_step_x0(benchmark: Any, suite: Suite, batch: int, dtype: str) -> None:
    options, kind = suite.options, DTYPES[dtype]
    shape = (64, 64) if options.quick else FLUX
    n = shape[0] * shape[1]
    torch.manual_seed(0)
    single = torch.randn(2, batch, n)
    x, u = single.to(kind).unbind(0)
    ours = fused(x, u)
    check(ours, x, u)
    check(lambda: eager(x, u), x, u)
    candidates: dict[str, Callable[[], object]] = {
        "ours": ours,
        "eager": lambda: eager(x, u),
        "randn": lambda: torch.randn_like(x),
        "generator": generator_alone(batch, n),
    }
    if options.quick:
        suite.leave_out("step_x0", "compile", "--quick: compiling takes longer than everything else together")
    else:
        fast = compiled(eager)
        check(lambda: fast(x, u), x, u)
        candidates["compile"] = lambda: fast(x, u)
    if kind != torch.float32:
        candidates["float32"] = fused(*single.unbind(0))
    times = paired(benchmark, candidates, options.turns(41), calls=8 if batch == 1 else 2)
    share = times["generator"].median / times["ours"].median
    for peer in (name for name in candidates if name not in ("ours", "generator")):
        suite.row(
            "step_x0", batch=batch, shape=shape, dtype=kind, ours=times["ours"], peer=peer, theirs=times[peer],
            bytes=4 * x.numel() * x.element_size(), generator_share=share,
        )  # fmt: skip
