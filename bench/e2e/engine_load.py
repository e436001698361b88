"""A long-lived engine on `scenes`: how full its model calls are, how long requests take under load, what one request
alone takes beside `flowfast.search`, and whether its memory grows.

    python -m bench engine_load

`fill`: 64 waiting requests of 50 to 500 NFE, in random order, in 16 slots and micro-batches of 16; `fill` is NFE of
the requests / NFE that the model ran, padding included, `fill_busy` the same while requests waited: the rest is the
end, where slots run empty. `load`: requests of five methods and 50 to 300 NFE arrive at random (Poisson) at 80 % of the
rate that the engine did with all of them waiting, default settings; latency from arrival to sample. `lone`: one request
at a time in an engine, beside `flowfast.search` with the same options, in turns; `ratio_paired` is the median of
seconds of search / seconds of the engine, turn by turn, above 1: the engine is faster. `memory`: bytes of resident
memory that each of 10,000 tiny requests beside a null model leaves behind, by the slope from a third on.
"""

from __future__ import annotations

import gc
import os
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

import flowfast
from bench.e2e.latency import percentile
from bench.e2e.null import NullFlow, NullReward
from bench.timing import Suite, Times
from flowfast.models.scenes import hard_prompts

SLOTS = MICRO_BATCH = 16
METHODS = ("svdd", "rbf", "bon", "ode", "smc")


def fill(flow: Any, methods: tuple[str, ...], count: int, most: int = 500) -> dict[str, Any]:
    """Runs `count` waiting requests to their end."""
    rng, prompts = random.Random(0), hard_prompts("tuning")
    engine = flowfast.Engine(flow, reward="scenes", slots=SLOTS, micro_batch=MICRO_BATCH)
    for at in range(count):
        engine.add_request(
            prompts[at % len(prompts)], method=methods[at % len(methods)], budget=rng.randint(50, most), seed=at
        )
    spent, done, busy, start = dict[str, int](), 0, 0.0, time.perf_counter()
    while engine.busy:
        for event in engine.step():
            done += isinstance(event, flowfast.Finished)
            if isinstance(event, flowfast.Progress):
                spent[event.id] = event.nfe
        if engine.core.scheduler.count:
            busy = sum(spent.values()) / engine.core.rows_seen
    core, seconds = engine.core, time.perf_counter() - start
    assert done == count
    engine.close()
    return {
        "fill": core.rows_used / core.rows_seen, "fill_busy": busy, "rounds": core.rounds, "nfe": core.rows_used,
        "seconds": seconds,
    }  # fmt: skip


def work(count: int, seed: int, most: int = 300) -> list[dict[str, Any]]:
    """Requests of all methods and budgets mixed."""
    rng, prompts = random.Random(seed), hard_prompts("tuning")
    return [
        {
            "prompt": rng.choice(prompts),
            "method": rng.choice(METHODS),
            "budget": rng.randint(50, most),
            "seed": rng.randrange(10**6),
        }
        for _ in range(count)
    ]


def serve(flow: Any, requests: list[dict[str, Any]], arrivals: list[float]) -> tuple[list[float], float]:
    """Latency of each request that arrived at these seconds, and seconds in all."""
    engine, latencies, at = flowfast.Engine(flow, reward="scenes"), list[float](), 0
    arrived: dict[str, float] = {}
    start = time.perf_counter()
    while at < len(requests) or engine.busy:
        now = time.perf_counter() - start
        while at < len(requests) and arrivals[at] <= now:
            arrived[engine.add_request(**requests[at])] = arrivals[at]
            at += 1
        if not engine.busy:
            time.sleep(max(0.0, arrivals[at] - now))
            continue
        for event in engine.step():
            if isinstance(event, flowfast.Finished):
                latencies.append(time.perf_counter() - start - arrived[event.id])
    engine.close()
    assert len(latencies) == len(requests)
    return latencies, time.perf_counter() - start


def lone(flow: Any, method: str, budget: int, turns: int) -> tuple[list[float], list[float]]:
    """Seconds of the engine and of `flowfast.search`, in turns."""
    engine, (prompt, *_) = flowfast.Engine(flow, reward="scenes"), hard_prompts("tuning")
    options: dict[str, Any] = {"method": method, "budget": budget, "seed": 1}

    def ours() -> None:
        engine.add_request(prompt, **options)
        assert any(isinstance(event, flowfast.Finished) for event in list(engine.stream()))

    def theirs() -> None:
        flowfast.search(flow, [prompt], reward="scenes", **options)

    seconds: tuple[list[float], list[float]] = ([], [])
    for turn in range(-1, turns):
        for side, run in ((0, ours), (1, theirs)) if turn % 2 else ((1, theirs), (0, ours)):
            start = time.perf_counter()
            run()
            if turn >= 0:
                seconds[side].append(time.perf_counter() - start)
    engine.close()
    return seconds


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def kept_by_requests(count: int) -> float:
    """Bytes of resident memory that a request leaves behind."""
    flow = NullFlow((4, 4), 2 * MICRO_BATCH, torch.float32)
    engine = flowfast.Engine(flow, reward=NullReward(), slots=SLOTS, micro_batch=MICRO_BATCH)
    rng, seen = random.Random(0), list[tuple[int, int]]()
    for at in range(count):
        engine.add_request(
            f"prompt number {at}", method=METHODS[at % 4], budget=rng.randint(44, 120), seed=at,
            guidance=1 + rng.random() if at % 8 == 1 else None, negative_prompt=f"no {at}" if at % 5 == 0 else "",
        )  # fmt: skip
        if at % 32 == 31 or at == count - 1:
            for event in engine.stream():
                assert not isinstance(event, flowfast.Failed)
        if at % (1 + count // 40) == 0:
            gc.collect()
            seen.append((at, resident()))
    engine.close()
    return statistics.linear_regression(*zip(*(each for each in seen if each[0] > count // 3), strict=True)).slope


def in_a_new_process(count: int) -> float:
    """`kept_by_requests`, where nothing that was freed before could hide it."""
    code = f"from bench.e2e.engine_load import kept_by_requests; print(kept_by_requests({count}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


def test_engine_load(benchmark: Any, suite: Suite) -> None:
    options = suite.options
    quick, turns, flow = options.quick, options.turns(9), flowfast.load("scenes")

    def row(case: str, ours: Times, peer: str, theirs: Times, **more: Any) -> None:
        suite.row(
            "engine_load", batch=SLOTS, shape=flow.shape, dtype=torch.float32, ours=ours, peer=peer, theirs=theirs,
            case=case, **more,
        )  # fmt: skip

    def all_of_it() -> None:
        for methods in (("svdd",), ("rbf",), ("svdd", "rbf", "bon")):
            found = fill(flow, methods, *((3, 60) if quick else (64,)))
            time_of = Times.of([found["seconds"]])
            row("fill " + " ".join(methods), time_of, "none", time_of, slots=SLOTS, micro_batch=MICRO_BATCH, **found)
        for method in METHODS[2:4] if quick else METHODS:
            for budget in (50,) if quick else (100, 200):
                ours, theirs = lone(flow, method, budget, turns)
                paired = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
                row(
                    f"lone {method} {budget}", Times.of(ours), "flowfast.search", Times.of(theirs), method=method,
                    budget=budget, ratio_paired=paired,
                )  # fmt: skip
        count = 3 if quick else 120
        requests = work(count, 1, 60 if quick else 300)
        _, seconds = serve(flow, requests, [0.0] * count)
        rng, at, arrivals = random.Random(2), 0.0, list[float]()
        for _ in requests:
            at += rng.expovariate(1.0)
            arrivals.append(at)
        arrivals = [each / at * seconds / 0.8 for each in arrivals]
        latencies, whole = serve(flow, requests, arrivals)
        time_of = Times.of(latencies)
        row(
            "load", time_of, "none", time_of, requests=count, capacity_per_s=count / seconds,
            offered_per_s=count / arrivals[-1], done_per_s=count / whole,
            p50_s=percentile(latencies, 0.5), p99_s=percentile(latencies, 0.99),
        )  # fmt: skip
        kept = in_a_new_process(200 if quick else 10_000)
        row("memory", Times.of([1.0]), "none", Times.of([1.0]), requests=200 if quick else 10_000, bytes_each=kept)

    benchmark.pedantic(all_of_it, rounds=1, iterations=1)
