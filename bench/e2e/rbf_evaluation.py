"""What one evaluation of rollover budget forcing costs beside the model: null model, null decoder, null reward.

    python -m bench rbf_evaluation --public-code FOLDER

One search of 200 evaluations with two chains, from admission to release, over the evaluations it made: ms are per
NFE. All sides convert to the variance-preserving path, use the SDE with g = 3 t^2 and 10 steps, and spend a tenth on
initial noises, as the public code's configuration does. Ours runs through the public methods of
`flowfast.rounds.batch.SlotBatch`, as Python and scripted (`engine`). Peers: `eager`, the plain PyTorch loop of
eager_rbf.py, and `public_code`, the paper's own, from a checkout (public_code.py says what is replaced there).
`condition` (512 x 4096: a FLUX text embedding a prompt) is what the search hands to the model with each evaluation.

Also in a row: `ops_per_nfe`, operators that reach PyTorch's dispatcher, and `peer_ops_per_nfe`; `launches_a_round`,
those of ours that do work (no views, no allocations; an op of flowfast counts once); `host_us_a_round`, ours with
latents of 16 numbers, where nothing but the host's work is left (two evaluations a round).
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.e2e.eager_rbf import eager_rbf
from bench.e2e.null import NullFlow, NullSearch, Operations, first_number
from bench.e2e.public_code import PublicRBF
from bench.timing import FLUX, Suite, Times, paired
from flowfast.ops import noise

NAME = "rbf_evaluation"
SCENES = (1024, 3)
"""3 x 32 x 32 numbers, laid out as tokens x channels because that is what the public code takes."""
CASES = {
    "flux-float32": (FLUX, torch.float32, (1,)),
    "flux-bfloat16": (FLUX, torch.bfloat16, (1,)),
    "flux-bfloat16-text": (FLUX, torch.bfloat16, (512, 4096)),
    "scenes-float32": (SCENES, torch.float32, (1,)),
}


class Shrinking(nn.Module):
    """u = -x / 2: a flow whose velocity matters, to compare the sides."""

    def __init__(self, shape: tuple[int, ...]):
        super().__init__()
        self.shape = shape
        self.interpolant, self.t_finish, self.guidance = "linear", 0.1, 1.0

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(len(prompts), 1)}

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -0.5 * x_t

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        return x0


def check_same_sample(budget: int, scripted: bool) -> None:
    """With the same noise, ours and the eager baseline find the same sample for the same NFE."""
    shape = (32, 4)
    ours = NullSearch(Shrinking(shape), budget=budget, dtype=torch.float32, scripted=scripted)
    found = ours.run()
    key = torch.tensor(ours.keys).repeat(ours.plan.chains)

    def same_noise(transition: list[int], tried: list[int]) -> Tensor:
        at = torch.tensor(transition)
        purpose = torch.where(at == 0, noise.INITIAL_NOISE, noise.TRANSITION)
        return noise.normals(key, at, torch.tensor(tried), torch.arange(len(transition)), purpose, shape[0] * shape[1])

    reward, sample, nfe = eager_rbf(
        lambda x, t: -0.5 * x, first_number, ours.resolved.schedule, ours.plan, shape, noise=same_noise
    )
    assert nfe == int(found["cost"][0]) == budget, (nfe, found["cost"], budget)
    assert sample is not None and abs(reward - float(found["reward"][0])) < 1e-4
    torch.testing.assert_close(found["x0"][0], sample, rtol=1e-4, atol=1e-4)


def host_us(budget: int, scripted: bool, repeats: int) -> float:
    """Median microseconds of one round, propose and observe, with latents of 16 numbers."""
    search = NullSearch(NullFlow((4, 4), 2, torch.float32), budget=budget, dtype=torch.float32, scripted=scripted)
    search.run()
    rounds = []
    for _ in range(repeats):
        search.admit()
        while search.engine.width() > 0:
            start = time.perf_counter()
            search.round()
            rounds.append(time.perf_counter() - start)
        search.engine.release(0)
    return 1e6 * statistics.median(rounds)


@pytest.mark.parametrize("case", CASES)
def test_rbf_evaluation(benchmark: Any, suite: Suite, case: str) -> None:
    options = suite.options
    shape, dtype, condition = CASES[case]
    if options.quick:
        shape, condition = (16, 4), (1,)
    budget, init = (60, 3) if options.quick else (200, 10)
    for scripted in (False, True):
        check_same_sample(budget, scripted)

    flow = NullFlow(shape, 2, dtype, condition)
    ours = {
        "python": NullSearch(flow, budget=budget, dtype=dtype),
        "scripted": NullSearch(flow, budget=budget, dtype=dtype, scripted=True),
    }
    zeros = torch.zeros(2, *shape, dtype=dtype)
    plan, schedule = ours["python"].plan, ours["python"].resolved.schedule
    eager = lambda: eager_rbf(lambda x, t: zeros, first_number, schedule, plan, shape, dtype)  # noqa: E731
    runs: dict[str, Any] = {engine: search.run for engine, search in ours.items()} | {"eager": eager}
    nfe = dict.fromkeys(runs, float(budget))
    for search in ours.values():
        for _ in range(3):  # a scripted module compiles itself anew in its first runs
            assert int(search.run()["cost"][0]) == budget
    assert eager()[2] == budget
    if options.public_code is None:
        suite.leave_out(NAME, "public_code", "no checkout named: --public-code or FLOWFAST_PUBLIC_CODE")
    else:
        public = PublicRBF(options.public_code, shape, dtype, batch=2, budget=budget, init=init, condition=condition)
        reward, image, spent = public.run()
        assert reward > -1e9 and bool(image.isfinite().all()) and budget - 2 <= spent <= budget
        runs["public_code"], nfe["public_code"] = public.run, float(spent)

    counts = {engine: search.operations() for engine, search in ours.items()}
    for side in list(runs)[len(ours) :]:
        with Operations() as counts[side]:
            runs[side]()
    times = paired(benchmark, runs, options.turns(11))
    per_nfe = {side: Times(*(value / nfe[side] for value in found)) for side, found in times.items()}
    for engine, search in ours.items():
        own, host = counts[engine], host_us(budget, engine == "scripted", 3 if options.quick else 21)
        for peer in list(runs)[len(ours) :]:
            suite.row(
                NAME, batch=2, shape=shape, dtype=dtype, ours=per_nfe[engine], peer=peer, theirs=per_nfe[peer],
                case=case, engine=engine, condition=list(condition), nfe=budget,
                ops_per_nfe=own.calls / nfe[engine], peer_ops_per_nfe=counts[peer].calls / nfe[peer],
                launches_a_round=own.launches / len(search.plan.widths()), host_us_a_round=host,
            )  # fmt: skip
