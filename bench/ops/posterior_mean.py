"""Guidance and posterior mean in one pass: u = u_uncond + w (u_cond - u_uncond), x0_hat = D x + E u; latents of FLUX.

    python -m bench posterior_mean

Peers: `eager` PyTorch, which also makes new tensors for both results, and `compile`. Every lane has its own guidance
and its own row of coefficients, on all sides.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.timing import FLUX, Suite, compiled, paired

D, E = 4, 5  # columns of the table
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.1}


def eager(x: Tensor, u: Tensor, uncond: Tensor, w: Tensor, d: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    guided = uncond + w * (u - uncond)
    return guided, d * x + e * guided


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("batch", [1, 8])
def test_posterior_mean(benchmark: Any, suite: Suite, batch: int, dtype: torch.dtype) -> None:
    options = suite.options
    shape = (64, 64) if options.quick else FLUX
    torch.manual_seed(0)
    x, u, uncond = torch.randn(3, batch, shape[0] * shape[1]).to(dtype).unbind(0)
    row, guidance = torch.arange(batch) % 3, torch.linspace(2.0, 5.0, batch)
    table = torch.randn(3, 8)
    columns = [column.to(dtype)[:, None] for column in (guidance, table[row, D], table[row, E])]
    u_out, x0_out = torch.empty_like(x), torch.empty_like(x)

    def ours() -> tuple[Tensor, Tensor]:
        torch.ops.flowfast.posterior_mean(x, u, uncond, guidance, row, table, u_out, x0_out)
        return u_out, x0_out

    candidates: dict[str, Callable[[], object]] = {"ours": ours, "eager": lambda: eager(x, u, uncond, *columns)}
    if options.quick:
        suite.leave_out("posterior_mean", "compile", "--quick: compiling takes longer than everything else together")
    else:
        fast = compiled(eager)
        candidates["compile"] = lambda: fast(x, u, uncond, *columns)
    exact = [guidance.double()[:, None], table[row, D].double()[:, None], table[row, E].double()[:, None]]
    truth = eager(x.double(), u.double(), uncond.double(), *exact)
    for run in candidates.values():
        for result, expected in zip(run(), truth, strict=True):  # type: ignore[call-overload]
            torch.testing.assert_close(result.double(), expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])
    times = paired(benchmark, candidates, options.turns(41), calls=8 if batch == 1 else 2)
    for peer in list(candidates)[1:]:
        suite.row(
            "posterior_mean", batch=batch, shape=shape, dtype=dtype, ours=times["ours"], peer=peer,
            theirs=times[peer], bytes=5 * x.numel() * x.element_size(),
        )  # fmt: skip
