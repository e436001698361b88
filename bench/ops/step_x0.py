"""Times one stochastic step plus posterior mean, x' = A x + B u + C z and x0_hat = D x + E u, on the CPU.

    python -m bench.ops.step_x0 [--batch 1 8] [--threads 1] [--dtype float32]

Compared, on the same latents (FLUX at 1024 x 1024: 4096 tokens of 64 channels): flowfast's fused op, PyTorch eager,
torch.compile with fallback_random (its own random numbers are scalar on the CPU and 7-9 times slower, so this is the
kinder comparison), and torch.randn_like alone. Checked before it is timed. Candidates take turns, so a change of the
machine's load hits all of them; the table shows medians.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from flowfast import ops

ELEMENTS = 4096 * 64
A, B, C, D, E = 1.02, -0.07, 0.13, 1.0, -0.9


def eager(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return A * x + B * u + C * torch.randn_like(x), D * x + E * u


def fused(x: Tensor, u: Tensor) -> Callable[[], tuple[Tensor, Tensor]]:
    lanes = torch.arange(len(x))
    zeros = torch.zeros_like(lanes)
    table = torch.tensor([[0.0] * 8, [A, B, C, 0.0, D, E, D, E]])
    out, x0_out = torch.empty_like(x), torch.empty_like(x)

    def run() -> tuple[Tensor, Tensor]:
        torch.ops.flowfast.branch_step(x, u, lanes, zeros + 1, zeros + 7, lanes, zeros, table, out, x0_out)
        return out, x0_out

    return run


def medians(candidates: dict[str, Callable[[], object]], rounds: int, calls: int) -> dict[str, float]:
    """Median milliseconds of a call, from `rounds` turns of `calls` calls each."""
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        for name, run in candidates.items():
            run()
            for _ in range(calls):
                start = time.perf_counter()
                run()
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def validate(run: Callable[[], tuple[Tensor, Tensor]], x: Tensor, u: Tensor) -> None:
    """The noise in the fused result is standard normal and the rest of it is the formula."""
    out, x0 = (tensor.double() for tensor in run())
    x, u = x.double(), u.double()
    z = (out - A * x - B * u) / C
    tolerance = 1e-5 if out.dtype == torch.float32 else 0.05
    torch.testing.assert_close(x0, D * x + E * u, rtol=0, atol=tolerance * 4)
    assert abs(float(z.mean())) < 4.9 / z.numel() ** 0.5 + tolerance, "mean of the noise"
    assert abs(float(z.var()) - 1) < 4.9 * (2 / z.numel()) ** 0.5 + tolerance, "variance of the noise"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch._inductor.config.fallback_random = True
    compiled = torch.compile(eager, dynamic=False)

    backend, reason = ops.live()["branch_step"]
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {arguments.threads} thread(s)")
    print(f"{arguments.dtype}, rows of {ELEMENTS} elements; branch_step: {backend} ({reason})")
    print(f"{'batch':>5} {'candidate':<36} {'ms':>8} {'GB/s':>7} {'ns/element':>11} {'against fused':>14}")
    for batch in arguments.batch:
        torch.manual_seed(0)
        x, u = torch.randn(2, batch, ELEMENTS).to(getattr(torch, arguments.dtype)).unbind(0)
        run = fused(x, u)
        validate(run, x, u)
        candidates: dict[str, Callable[[], object]] = {
            "flowfast branch_step": run,
            "torch eager": lambda x=x, u=u: eager(x, u),
            "torch.compile, fallback_random": lambda x=x, u=u: compiled(x, u),
            "torch.randn_like alone": lambda x=x: torch.randn_like(x),
        }
        result = medians(candidates, arguments.rounds, calls=10 if batch == 1 else 3)
        ours = result["flowfast branch_step"]
        moved = 4 * x.numel() * x.element_size()  # x, u in; x', x0_hat out
        for name, ms in result.items():
            rate = f"{moved / ms / 1e6:7.1f}" if name != "torch.randn_like alone" else "      -"
            print(f"{batch:>5} {name:<36} {ms:8.3f} {rate} {1e6 * ms / x.numel():11.2f} {ms / ours:13.2f}x")


if __name__ == "__main__":
    main()
