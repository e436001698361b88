"""For the day a GPU is at hand: are all ops right on it, and how fast are they?

    python -m bench.gpu [--results bench/results/gpu.json]

Everything is done once with the Triton kernels and once with the library's CUDA kernels, where both are there
(FLOWFAST_BACKEND=triton or cuda: only those). First every op of torch.ops.flowfast runs on the device, with fresh
inputs each time and outputs full of NaN (or -777), and is compared with the equation in float64 or, where the
specification says so, with the reference bit by bit. Then the ops are timed with CUDA events, the L2 cache flushed
before every launch, in turns with PyTorch eager and, beside the first kernels, torch.compile, next to the time that
the device's own copy bandwidth would allow; kernels that failed a check are not timed. assign_lanes and decide, which
move a search on, are timed as part of its rounds (rbf_evaluation). One table, one JSON. It ends within 8 minutes: what
does not fit is left out and says so. Of flowfast's requirements it needs torch and what stands in NEEDED.

Exit code 0: all is right; 1: a check failed; 2: no CUDA device, or a package is missing; 3: stopped by the deadline
before the checks ended.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

NEEDED = {"numpy": "numpy", "PIL": "pillow", "pydantic": "pydantic", "safetensors": "safetensors", "yaml": "pyyaml"}
"""Modules beside torch that flowfast.search and the report import, and the packages that bring them."""


def missing(packages: dict[str, str]) -> list[str]:
    """The packages whose modules cannot be imported."""
    found = []
    for module, package in packages.items():
        try:
            importlib.import_module(module)
        except ImportError:
            found.append(package)
    return found


if names := " ".join(missing(NEEDED)):  # now: the imports below would stop at the first
    print(
        f"bench.gpu: not installed here: {names}; nothing was checked or timed. `python3 -m pip install {names}`, or "
        f"without a network: `pip download --only-binary=:all: -d build/wheels {names}` elsewhere, then here "
        f"`python3 -m pip install --no-index --find-links build/wheels {names}`"
    )
    sys.exit(2)

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flowfast
from bench.e2e.eager_rbf import eager_rbf
from bench.e2e.null import NullFlow, NullSearch, first_number
from bench.timing import FLUX, Options, Suite, Times, compiled, table
from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule
from flowfast.ops import RESAMPLING, branch_step, noise, posterior_mean
from flowfast.ops import backend as ops_backend
from flowfast.report.write import write_json

SECONDS = 480.0
RESERVE = 20.0  # a last item that takes longer than expected, and the writing
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (1, 7, 123, 1023, 4096, 4097, FLUX[0] * FLUX[1])
POISON = -777
ROUNDING = {torch.float32: 1.3e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
"""Relative error of a result that is right to float32 and then rounded to the storage type."""


class Wrong(Exception):
    """An op gave something else than it should."""


@dataclass
class Run:
    """Where it runs, until when, and what came out."""

    device: torch.device
    seconds: float = SECONDS
    sizes: tuple[int, ...] = SIZES
    compile: bool = True
    turns: int = 31
    latent: tuple[int, int] = FLUX
    started: float = field(default_factory=time.monotonic)
    checks: list[dict[str, Any]] = field(default_factory=list)
    suite: Suite = field(default_factory=lambda: Suite(Options()))
    cut: list[str] = field(default_factory=list)

    @property
    def cuda(self) -> bool:
        return self.device.type == "cuda"

    def fits(self, what: str) -> bool:
        """Is there time for one more item? Else it is noted as left out."""
        if time.monotonic() - self.started < self.seconds - RESERVE:
            return True
        self.cut.append(f"{what} ({ops_backend._forced})" if ops_backend._forced else what)
        return False

    def report(self) -> dict[str, Any]:
        results = list(self.suite.results.values())
        return {
            "device": torch.cuda.get_device_name(self.device) if self.cuda else "cpu",
            "seconds": time.monotonic() - self.started,
            "checks": self.checks,
            "rows": [row for result in results for row in result["rows"]],
            "left_out": [entry for result in results for entry in result["left_out"]]
            + [{"name": what, "peer": "", "reason": "the deadline came first"} for what in self.cut],
        }


# ---- checks ----


def fresh(run: Run, seed: int) -> Callable[..., Tensor]:
    """normal(*shape, dtype=...) on the host, a different one for every seed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    normal.generator = generator  # type: ignore[attr-defined]
    return normal


def integers(normal: Any, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high, shape, generator=normal.generator)


def poisoned(run: Run, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.full(shape, math.nan if dtype.is_floating_point else POISON, dtype=dtype, device=run.device)


def near(what: str, found: Tensor, truth: Tensor, dtype: torch.dtype, rows: Tensor | None = None) -> None:
    """found is truth (float64) but for the rounding of dtype; where rows is False it still holds the poison."""
    found, truth = found.cpu().double(), truth.double()
    if rows is not None:
        if not bool(found[~rows].isnan().all()):
            raise Wrong(f"{what}: a lane of padding was written")
        found, truth = found[rows], truth[rows]
    error = (found - truth).abs() - ROUNDING[dtype] * truth.abs()
    if bool(found.isnan().any()) or (error.numel() and float(error.max()) > 1e-5):
        worst = "a NaN was left or made" if bool(found.isnan().any()) else f"off by {float(error.max()):.3g}"
        raise Wrong(f"{what}: {worst}")


def equal(what: str, found: Tensor, expected: Tensor) -> None:
    """The same bits; a NaN equals a NaN."""
    found = found.cpu()
    same = (found == expected) | (found.isnan() & expected.isnan()) if found.is_floating_point() else found == expected
    if not bool(same.all()):
        raise Wrong(f"{what}: {int((~same).sum())} of {same.numel()} numbers differ from the reference")


def address(normal: Any, lanes: int, rows: int) -> list[Tensor]:
    """key, row, candidate, chain; lane 0 starts from the initial noise, lane 2 (if there) is padding."""
    row = integers(normal, 0, rows, lanes)
    row[0] = 0
    row[2:3] = -1
    key = integers(normal, -(2**63), 2**63 - 1, lanes)
    candidate, chain = integers(normal, 0, 2**32, 2, lanes).unbind(0)
    return [key, row, candidate, chain]


def float64_normals(columns: list[Tensor], purpose: int, n: int) -> Tensor:
    """Box-Muller on the words of the stream, in float64 with the library's own functions."""
    blocks = -(-n // noise.BLOCK)
    words = noise.words(*columns, purpose, blocks * noise.BLOCK).view(len(columns[0]), blocks, 2, 2, noise.COUNTERS)
    a, b = words.unbind(3)
    radius = (-2 * ((((a >> 8) + 1).double() * 2.0**-24).log())).sqrt()
    angle = b.double() * (2 * math.pi / 2**32)
    return torch.stack([radius * angle.cos(), radius * angle.sin()], 3).flatten(1)[:, :n]


def check_normal(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    columns = address(normal, 5, 40)
    out, live = poisoned(run, 5, n, dtype=dtype), columns[1] >= 0
    torch.ops.flowfast.normal_(out, *on(run, columns), noise.TRANSITION)
    at = [column.clamp(min=0) if i == 1 else column for i, column in enumerate(columns)]
    near("normal_", out, float64_normals(at, noise.TRANSITION, n), dtype, live)
    exact = torch.full((5, n), math.nan, dtype=dtype)
    noise.normal_reference(exact, *columns, noise.TRANSITION)
    equal("normal_", out, exact)


def check_uniform(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    columns = address(normal, 5, 40)
    out, exact = poisoned(run, 5, n), torch.full((5, n), math.nan)
    torch.ops.flowfast.uniform_(out, *on(run, columns), noise.SELECTION)
    noise.uniform_reference(exact, *columns, noise.SELECTION)
    equal("uniform_", out, exact)
    written = out[columns[1].to(run.device) >= 0]
    if not bool(((written > 0) & (written < 1)).all()):
        raise Wrong("uniform_: a number lies outside (0, 1)")


def check_branch_step(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    x, u, grad = normal(4, n, dtype=dtype), normal(4, n, dtype=dtype), normal(7, n, dtype=dtype)
    key, row, candidate, chain = address(normal, 7, 6)
    parent = integers(normal, 0, 4, 7)
    parent[5] = -1
    coefficients = normal(6, 8)
    coefficients[0] = torch.tensor([0, 0, 1.0, 0, 1, -1, 0, 0])
    operands = [x, u, parent, row, key, candidate, chain, coefficients]
    double = [tensor.double() if tensor.is_floating_point() else tensor for tensor in operands]
    live = (row >= 0) & (parent >= 0)
    for gradient in (None, grad):
        out, x0 = poisoned(run, 7, n, dtype=dtype), poisoned(run, 7, n, dtype=dtype)
        torch.ops.flowfast.branch_step(*on(run, operands), out, x0, None if gradient is None else grad.to(run.device))
        truth, truth_x0 = torch.zeros(2, 7, n, dtype=torch.float64).unbind(0)
        branch_step.reference(*double, truth, truth_x0, None if gradient is None else grad.double())
        near("branch_step", out, truth, dtype, live)
        near("branch_step x0_out", x0, truth_x0, dtype, live)


def check_posterior_mean(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    x, u, uncond = (normal(6, n, dtype=dtype) for _ in range(3))
    row, guidance = integers(normal, 0, 4, 6), torch.tensor([0.0, 1.0, 3.5, -2.0, 7.0, 1.5])
    row[4] = -1
    coefficients = normal(4, 8)
    for null, scale in ((None, None), (uncond, guidance)):
        u_out, x0 = poisoned(run, 6, n, dtype=dtype), poisoned(run, 6, n, dtype=dtype)
        broken = torch.zeros(6, dtype=torch.bool, device=run.device)
        torch.ops.flowfast.posterior_mean(*on(run, [x, u, null, scale, row, coefficients]), u_out, x0, broken)
        equal("posterior_mean broken", broken, torch.zeros(6, dtype=torch.bool))
        truth_u, truth_x0 = torch.zeros(2, 6, n, dtype=torch.float64).unbind(0)
        uncond64 = None if null is None else null.double()
        posterior_mean.reference(x.double(), u.double(), uncond64, scale, row, coefficients.double(), truth_u, truth_x0)
        near("posterior_mean u_out", u_out, truth_u, dtype, row >= 0)
        near("posterior_mean x0_out", x0, truth_x0, dtype, row >= 0)
    u[1, n // 2], u[4] = math.nan, math.inf  # lane 4 is padding
    alone = poisoned(run, 6, n, dtype=dtype)
    torch.ops.flowfast.posterior_mean(*on(run, [x, u, None, None, row, coefficients]), None, alone, broken)
    equal("posterior_mean broken", broken, torch.tensor([False, True, False, False, False, False]))


def check_normalize_log_weights(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    logs = 30 * normal(5, n)
    logs[1, 0], logs[2], logs[3, -1] = -math.inf, -math.inf, math.nan
    weights, ess, log_normalizer = poisoned(run, 5, n), poisoned(run, 5), poisoned(run, 5)
    torch.ops.flowfast.normalize_log_weights(logs.to(run.device), weights, ess, log_normalizer)
    exact = [torch.zeros(5, n), torch.zeros(5), torch.zeros(5)]
    ops_backend.OPS["normalize_log_weights"].reference(logs, *exact)
    for found, expected in zip((weights, ess, log_normalizer), exact, strict=True):
        equal("normalize_log_weights", found, expected)
    logs = torch.where(logs.isnan(), -math.inf, logs).double()
    full = ~(logs == -math.inf).all(1)
    truth = logs[full].softmax(1)
    near("normalize_log_weights weights", weights[full.to(run.device)], truth, torch.float32)
    near("normalize_log_weights ess", ess[full.to(run.device)], 1 / truth.square().sum(1), torch.float32)
    truth = logs[full].logsumexp(1) - math.log(n)
    near("normalize_log_weights log_normalizer", log_normalizer[full.to(run.device)], truth, torch.float32)


def check_resample(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    weights = (2 * normal(4, n)).softmax(1)
    weights[3] = math.nan
    key, row = integers(normal, -(2**63), 2**63 - 1, 4), integers(normal, 0, 40, 4)
    enabled = torch.tensor([True, True, False, True])
    for scheme in RESAMPLING.values():
        ancestors, expected = poisoned(run, 4, n, dtype=torch.int64), torch.zeros(4, n, dtype=torch.int64)
        torch.ops.flowfast.resample(*on(run, [weights, key, row, enabled]), scheme, ancestors)
        ops_backend.OPS["resample"].reference(weights, key, row, enabled, scheme, expected)
        equal(f"resample scheme {scheme}", ancestors, expected)


def check_gather_ancestors(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
    x, u = normal(8, n, dtype=dtype), normal(8, n, dtype=dtype)
    ancestors = torch.tensor([0, 0, 2, 0, 4, 5, 5, 2])
    x_store, u_store = on(run, [x, u])
    torch.ops.flowfast.gather_ancestors_(x_store, u_store, ancestors.to(run.device))
    equal("gather_ancestors_ x", x_store, x[ancestors])
    equal("gather_ancestors_ u", u_store, u[ancestors])


class Recorder(TorchDispatchMode):
    """Keeps copies of the operands of one op as they are before each call."""

    def __init__(self, op: str):
        super().__init__()
        self.op, self.calls = f"flowfast::{op}", list[list[Any]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name == self.op:
            self.calls.append([value.clone() if isinstance(value, Tensor) else value for value in args])
        return func(*args, **(kwargs or {}))


def check_round(op: str) -> Callable[[Run, Any, int, torch.dtype], None]:
    """For an op that updates the state of a search: all it writes is the reference's, bit by bit, on the states of a
    search on the host with random rewards, some of them NaN. What it writes holds the values of the round before."""

    def check(run: Run, normal: Any, n: int, dtype: torch.dtype) -> None:
        slots, lanes = 3, int(integers(normal, 1, 4, 1))
        flow, recorder = NullFlow((n, 1), slots * 2 * lanes, dtype), Recorder(op)
        search = NullSearch(flow, budget=40, dtype=dtype, slots=slots, lanes=lanes, method="rbf", steps=6, top_k=2)
        search.admit()
        with recorder:
            while search.engine.width() > 0:
                rewards = normal(len(search.engine.propose()))
                rewards[normal(len(rewards)) > 1.5] = math.nan
                search.engine.observe(rewards)
        if not recorder.calls:
            raise Wrong(f"{op}: the search never calls it")
        schema = getattr(torch.ops.flowfast, op).default._schema.arguments
        written = [i for i, argument in enumerate(schema) if argument.alias_info and argument.alias_info.is_write]
        for operands in recorder.calls[:: max(1, len(recorder.calls) // 4)]:
            found = [on(run, [value])[0] if isinstance(value, Tensor) else value for value in operands]
            getattr(torch.ops.flowfast, op)(*found)
            ops_backend.OPS[op].reference(*operands)
            for i in written:
                equal(f"{op} {schema[i].name}", found[i], operands[i])

    return check


CHECKS: dict[str, Callable[[Run, Any, int, torch.dtype], None]] = {
    "normal_": check_normal,
    "uniform_": check_uniform,
    "branch_step": check_branch_step,
    "posterior_mean": check_posterior_mean,
    "normalize_log_weights": check_normalize_log_weights,
    "resample": check_resample,
    "gather_ancestors_": check_gather_ancestors,
    "assign_lanes": check_round("assign_lanes"),
    "decide": check_round("decide"),
}
LATENTS = {"normal_", "branch_step", "posterior_mean", "gather_ancestors_", "decide"}  # in three storage types


def on(run: Run, tensors: Sequence[Tensor | None]) -> list[Any]:
    """Copies on the device, even where that is the host: what an op writes must not reach what it is compared with."""
    return [None if tensor is None else tensor.to(run.device, copy=True) for tensor in tensors]


def check_all(run: Run) -> bool:
    """Every op over sizes and storage types, with the kernels that answer now; True: all right."""
    before = len(run.checks)
    for op in ops_backend.OPS:
        entry: dict[str, Any] = {"op": op, "backend": backend(run, op), "cases": 0, "error": None}
        run.checks.append(entry)
        if op not in CHECKS:
            entry["error"] = "bench/gpu.py has no check of this op"
        for n in run.sizes if op in CHECKS else ():
            for dtype in DTYPES if op in LATENTS else DTYPES[:1]:
                if not run.fits(f"check of {op}"):
                    entry["error"] = "not finished: the deadline came first"
                    break
                try:
                    CHECKS[op](run, fresh(run, 1000 * entry["cases"] + n), n, dtype)
                    entry["cases"] += 1
                except Exception as error:  # a kernel that does not even run is a finding, not the end
                    entry["error"] = entry["error"] or f"{n} elements, {dtype}: {type(error).__name__}: {error}"
        print(f"{op:<24} {entry['backend']:<10} {entry['cases']:>4} cases  {entry['error'] or 'right'}", flush=True)
    run.checks.append(check_search(run))
    if run.cuda:
        run.checks.append(check_waits(run))
    return all(entry["error"] is None for entry in run.checks[before:])


def check_waits(run: Run) -> dict[str, Any]:
    """A round of the search makes the host wait for nothing: CUDA's own guard raises where it would."""
    entry: dict[str, Any] = {"op": "a round waits for nothing", "backend": "", "cases": 0, "error": None}
    entry["backend"] = backend(run, "branch_step")
    search = NullSearch(
        NullFlow((64, 64), 2, torch.float32, device=run.device), budget=60, dtype=torch.float32, device=run.device
    )
    search.run()
    search.admit()
    try:
        torch.cuda.set_sync_debug_mode("error")
        while search.engine.width() > 0:
            search.round()
            entry["cases"] += 1
    except RuntimeError as error:
        entry["error"] = str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    print(
        f"{entry['op']:<24} {entry['backend']:<10} {entry['cases']:>4} rounds {entry['error'] or 'right'}", flush=True
    )
    return entry


class FirstNumber(nn.Module):
    """A reward on the device: the first number of an image."""

    name, range, differentiable = "first", (-1e9, 1e9), False

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(len(prompts), 1, device=self.device)}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return first_number(images)


def whole_search(run: Run, shape: tuple[int, ...], **options: Any) -> flowfast.SearchResult:
    """RBF for three prompts in two slots on a flow of one multiplication."""

    def encode(prompts: list[str]) -> dict[str, Tensor]:
        return {"weight": torch.tensor([[len(prompt) / 8] for prompt in prompts], device=run.device)}

    def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -0.5 * x_t * cond["weight"].view(-1, *[1] * len(shape))

    return flowfast.search(
        flowfast.flow_from(velocity, shape, encode=encode), ["a", "bb", "ccc"], reward=FirstNumber(run.device),
        method="rbf", slots=2, **options,
    )  # fmt: skip


def check_search(run: Run) -> dict[str, Any]:
    """flowfast.search with records, from CUDA graphs, finds what it finds eagerly, bit by bit."""
    entry: dict[str, Any] = {"op": "a search from graphs", "cases": 0, "error": None}
    entry["backend"] = backend(run, "branch_step")
    try:
        for method_options in ({}, {"margin": 0.5}):
            told: list[list[Any]] = [[], []]
            one, other = (
                whole_search(run, (31, 3), budget=60, cuda_graphs=graphs, on_round=found.extend,
                             method_options=method_options)
                for graphs, found in zip((True, False), told, strict=True)
            )  # fmt: skip
            if told[0] != told[1]:
                raise Wrong("the records differ")
            for left, right in zip(one.samples, other.samples, strict=True):
                if left.winner != right.winner:
                    raise Wrong(f"winner {left.winner}, expected {right.winner}")
                equal("latent", left.latent, right.latent)
            entry["cases"] += 1
    except Exception as error:  # as in check_all
        entry["error"] = f"{type(error).__name__}: {error}"
    print(
        f"{entry['op']:<24} {entry['backend']:<10} {entry['cases']:>4} cases  {entry['error'] or 'right'}", flush=True
    )
    return entry


def backends(run: Run) -> list[str]:
    """For use_backend: all that have kernels of their own for the device, else (or if one is forced) what is live."""
    found = []
    for name in ("triton", "cuda") if run.cuda and not ops_backend._forced else ():
        with contextlib.suppress(OptionError), ops_backend.use_backend(name):
            found.append(name)
    return found or [ops_backend._forced]


def backend(run: Run, op: str) -> str:
    """Which kernels answer for the op on the device."""
    return ops_backend.live(run.device.type)[op][0]


# ---- times ----


class Stopwatch:
    """Times of candidates that take turns, each with a cold cache: events on CUDA, the wall clock elsewhere."""

    def __init__(self, run: Run):
        self.run = run
        size = 1 << 28 if run.cuda else 1 << 20
        if run.cuda:
            size = max(size, 4 * torch.cuda.get_device_properties(run.device).L2_cache_size)
        self.flush = torch.empty(size, dtype=torch.int8, device=run.device)

    def once(self, function: Callable[[], object]) -> float:
        """Seconds of one call."""
        for _ in range(4 if self.run.cuda else 1):  # long enough for the host to hand over all that is timed
            self.flush.zero_()
        if not self.run.cuda:
            start = time.perf_counter()
            function()
            return time.perf_counter() - start
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        function()
        after.record()
        after.synchronize()
        return before.elapsed_time(after) / 1000

    def turns(self, candidates: dict[str, Callable[[], object]]) -> dict[str, Times]:
        seconds: dict[str, list[float]] = {name: [] for name in candidates}
        for turn in range(-3, self.run.turns):  # the first three warm up
            for name, function in candidates.items():
                value = self.once(function)
                if turn >= 0:
                    seconds[name].append(value)
        return {name: Times.of(values) for name, values in seconds.items()}


def bandwidth(run: Run, watch: Stopwatch) -> float:
    """GB/s that a plain copy reaches, reads and writes counted."""
    source = torch.zeros(1 << 29 if run.cuda else 1 << 22, dtype=torch.int8, device=run.device)
    target = torch.empty_like(source)
    return 2 * source.numel() / watch.turns({"copy": lambda: target.copy_(source)})["copy"].median / 1e6


def work(
    run: Run,
) -> Iterator[tuple[str, int, torch.dtype, int, Callable[[], object], dict[str, Callable[..., Any]], tuple[Any, ...]]]:
    """(op, batch, dtype, bytes, ours, peers, the peers' arguments)."""
    n, device = run.latent[0] * run.latent[1], run.device
    flow = torch.ops.flowfast
    for dtype in (torch.bfloat16, torch.float32):
        for batch in (1, 8, 32):
            x, u, uncond = torch.randn(3, batch, n, device=device).to(dtype).unbind(0)
            out, x0 = torch.empty_like(x), torch.empty_like(x)
            lane = torch.arange(batch, device=device)
            zero, size = torch.zeros_like(lane), x.numel() * x.element_size()
            rows = torch.tensor([[0.0] * 8, [1.02, -0.07, 0.13, 0, 1, -0.9, 1, -0.9]], device=device)
            one, guidance = zero + 1, torch.full((batch,), 3.5, device=device)

            def normals(out: Tensor = out, lane: Tensor = lane, zero: Tensor = zero) -> None:
                flow.normal_(out, lane, zero, lane, zero, 1)

            def step(a: tuple[Any, ...] = (x, u, lane, one, lane, lane, zero, rows, out, x0)) -> None:
                flow.branch_step(*a)

            def mean(a: tuple[Any, ...] = (x, u, uncond, guidance, one, rows, out, x0)) -> None:
                flow.posterior_mean(*a)

            yield "normal_", batch, dtype, size, normals, {"eager": torch.randn_like}, (x,)
            yield "branch_step", batch, dtype, 4 * size, step, {"eager": eager_step}, (x, u)
            yield "posterior_mean", batch, dtype, 5 * size, mean, {"eager": eager_mean}, (x, u, uncond)
        x, u = torch.randn(2, 16, n, device=device).to(dtype).unbind(0)
        parents = torch.arange(16, device=device)
        parents[1:12:2] = parents[0:12:2].clone()  # 6 are dead
        size = 16 * n * x.element_size()

        def gather(x: Tensor = x, u: Tensor = u, parents: Tensor = parents) -> None:
            flow.gather_ancestors_(x, u, parents)

        yield "gather_ancestors_", 16, dtype, size * 4 * 6 // 16, gather, {"eager": eager_gather}, (x, u, parents)
    logs = torch.randn(16, 64, device=device)
    weights, ess, log_normalizer = torch.empty_like(logs), logs.new_empty(16), logs.new_empty(16)

    def normalize() -> None:
        flow.normalize_log_weights(logs, weights, ess, log_normalizer)

    yield "normalize_log_weights", 16, logs.dtype, 8 * logs.numel(), normalize, {"eager": eager_normalize}, (logs,)
    slot, ancestors = torch.arange(16, device=device), torch.empty(16, 64, dtype=torch.int64, device=device)
    given, enabled = logs.softmax(1), torch.ones(16, dtype=torch.bool, device=device)

    def resample() -> None:
        flow.resample(given, slot, slot, enabled, RESAMPLING["systematic"], ancestors)

    yield "resample", 16, logs.dtype, 12 * logs.numel(), resample, {"eager": eager_systematic}, (given,)
    out, lane = torch.empty(16, 64, device=device), torch.arange(16, device=device)

    def uniforms() -> None:
        flow.uniform_(out, lane, lane, lane, lane, noise.SELECTION)

    yield "uniform_", 16, out.dtype, 4 * out.numel(), uniforms, {"eager": torch.rand_like}, (out,)


def eager_step(x: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    return 1.02 * x - 0.07 * u + 0.13 * torch.randn_like(x), x - 0.9 * u


def eager_mean(x: Tensor, u: Tensor, uncond: Tensor) -> tuple[Tensor, Tensor]:
    guided = uncond + 3.5 * (u - uncond)
    return guided, x - 0.9 * guided


def eager_gather(x: Tensor, u: Tensor, parents: Tensor) -> tuple[Tensor, Tensor]:
    return x[parents], u[parents]


def eager_normalize(logs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    weights = logs.softmax(1)
    return weights, 1 / weights.square().sum(1), logs.logsumexp(1) - math.log(logs.size(1))


def eager_systematic(weights: Tensor) -> Tensor:
    n = weights.size(1)
    points = (torch.arange(n, device=weights.device) + torch.rand(len(weights), 1, device=weights.device)) / n
    return torch.searchsorted(weights.cumsum(1), points).clamp(max=n - 1)


def time_all(run: Run, compile: bool) -> None:
    watch = Stopwatch(run)
    peak = bandwidth(run, watch)
    print(f"a plain copy moves {peak:.0f} GB/s", flush=True)
    for op, batch, dtype, size, ours, peers, arguments in work(run):
        if not run.fits(f"time of {op}, batch {batch}, {dtype}"):
            continue
        candidates: dict[str, Callable[[], object]] = {"ours": ours}
        for name, function in peers.items():
            candidates[name] = lambda function=function, arguments=arguments: function(*arguments)
        if compile:
            fast = compiled(peers["eager"])
            candidates["compile"] = lambda fast=fast, arguments=arguments: fast(*arguments)
            try:
                candidates["compile"]()
            except Exception as error:
                del candidates["compile"]
                reason = f"batch {batch}, {dtype}: {type(error).__name__}: {str(error).splitlines()[0]}"
                run.suite.leave_out(op, "compile", reason)
        times = watch.turns(candidates)
        shape = run.latent if op in LATENTS else (64,)
        limit = size / peak / 1e6
        for peer in list(candidates)[1:]:
            run.suite.row(
                op, batch=batch, shape=shape, dtype=dtype, ours=times["ours"],
                peer=peer, theirs=times[peer], bytes=size, limit_ms=limit, share_of_limit=limit / times["ours"].median,
                copy_gb_s=peak, backend=backend(run, op),
            )  # fmt: skip


def time_rounds(run: Run) -> None:
    """One evaluation of RBF without model, decoder and reward, as bench/e2e/rbf_evaluation.py, on the device."""
    for dtype in (torch.bfloat16, torch.float32):
        for scripted in (False, True):
            if not run.fits("time of rbf_evaluation"):
                return
            flow = NullFlow(run.latent, 2, dtype, device=run.device)
            search = NullSearch(flow, budget=100, dtype=dtype, scripted=scripted, device=run.device)
            schedule: Schedule = search.resolved.schedule
            seconds: dict[str, list[float]] = {"ours": [], "eager": []}

            def eager(flow: NullFlow = flow, search: NullSearch = search, dtype: torch.dtype = dtype) -> object:
                return eager_rbf(
                    lambda x, t: flow.zeros, first_number, search.resolved.schedule, search.plan, run.latent, dtype,
                    device=run.device,
                )  # fmt: skip

            counted = search.operations()
            for turn in range(-2, max(3, run.turns // 4)):
                for name, function in (("ours", search.run), ("eager", eager)):
                    start = time.perf_counter()
                    function()
                    if run.cuda:
                        torch.cuda.synchronize()
                    if turn >= 0:
                        seconds[name].append((time.perf_counter() - start) / 100)
            run.suite.row(
                "rbf_evaluation", batch=2, shape=run.latent, dtype=dtype, ours=Times.of(seconds["ours"]), peer="eager",
                theirs=Times.of(seconds["eager"]), engine="scripted" if scripted else "python",
                transitions=schedule.transitions,
                launches_a_round=counted.launches / len(search.plan.widths()), backend=backend(run, "branch_step"),
            )  # fmt: skip


def time_graphs(run: Run) -> None:
    """A whole search whose model costs nothing, from CUDA graphs and without them (on the CPU both run eagerly)."""
    if not run.fits("time of search"):
        return
    seconds: dict[bool, list[float]] = {True: [], False: []}
    for turn in range(-1, max(3, run.turns // 4)):
        for graphs, found in seconds.items():
            start = time.perf_counter()
            result = whole_search(run, run.latent, budget=100, cuda_graphs=graphs)
            if turn >= 0:
                found.append((time.perf_counter() - start) / result.rounds)
    run.suite.row(
        "search_round", batch=2, shape=run.latent, dtype=torch.float32, ours=Times.of(seconds[True]), peer="no graphs",
        theirs=Times.of(seconds[False]), backend=backend(run, "branch_step"),
    )  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results" / "gpu.json")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"deadline (default {SECONDS:g})")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device (torch.cuda.is_available() is False); nothing was checked or timed")
        return 2
    run = Run(torch.device("cuda"), min(options.seconds, SECONDS))

    def stop() -> None:
        print("bench.gpu: stopped at the deadline in the middle of an item", flush=True)
        write_json(options.results, run.report())
        os._exit(3)

    watchdog = threading.Timer(run.seconds, stop)
    watchdog.daemon = True
    watchdog.start()
    with torch.no_grad():
        code = finish(run, options.results)
    watchdog.cancel()
    return code


def finish(run: Run, results: Path) -> int:
    """Checks, then times what may be timed; prints and writes. The exit code."""
    names, right = backends(run), []
    for name in names:
        with ops_backend.use_backend(name):
            right += [name] if check_all(run) else []
    for name in right:
        with ops_backend.use_backend(name):
            time_all(run, run.compile and name == right[0])
            time_rounds(run)
            time_graphs(run)
    print(table(run.suite.results))
    write_json(results, run.report())
    print(f"{results}: {len(run.checks)} checks, {time.monotonic() - run.started:.0f} s")
    if any(what.startswith("check") for what in run.cut):
        return 3
    return 0 if right == names else 1


if __name__ == "__main__":
    sys.exit(main())
