"""Latency of a request and images a second on `scenes`, against the number of slots.

    python -m bench latency

A request is one prompt, RBF with a budget of 60 NFE. All wait at the start; a slot that gets free takes the next one,
so as many requests as there are slots are always under way. A request's latency runs from its admission to its sample:
requests are admitted in order, so the k-th sample that is finished admits request slots + k. The micro-batch is 2
lanes a slot, up to 32. `ours_ms` is the time an image takes (1000 / images_s), the peer `one slot` the same with
one slot.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

import torch

import flowfast
from bench.timing import Suite, Times
from flowfast import rewards
from flowfast.models.scenes import hard_prompts

SLOTS = (1, 2, 4, 8, 16)


def latencies(finished: dict[int, float], started: float, slots: int) -> list[float]:
    """Seconds each request took, from when request i was finished, all on one clock."""
    ends = sorted(finished.values())
    return [finished[i] - (started if i < slots else ends[i - slots]) for i in range(len(finished))]


def percentile(values: list[float], share: float) -> float:
    return statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * share) - 1]


def test_latency(benchmark: Any, suite: Suite) -> None:
    options = suite.options
    count, budget, numbers = (4, 24, (1, 2)) if options.quick else (64, 60, SLOTS)
    flow, reward = flowfast.load("scenes"), rewards.load("scenes")
    prompts = hard_prompts("tuning")
    prompts = (prompts * (1 + count // len(prompts)))[:count]
    found: dict[int, list[float]] = {slots: [] for slots in numbers}
    seconds: dict[int, list[float]] = {slots: [] for slots in numbers}

    def serve(slots: int, prompts: list[str] = prompts) -> None:
        finished: dict[int, float] = {}
        started = time.perf_counter()
        result = flowfast.search(
            flow, prompts, reward=reward, method="rbf", budget=budget, slots=slots, micro_batch=min(32, 2 * slots),
            on_sample=lambda index, _: finished.__setitem__(index, time.perf_counter()),
        )  # fmt: skip
        seconds[slots].append(time.perf_counter() - started)
        assert len(finished) == len(result.samples) == len(prompts)
        found[slots] += latencies(finished, started, slots)

    def all_numbers() -> None:
        for slots in numbers:
            serve(slots)

    serve(numbers[-1], prompts[: numbers[-1]])  # warms up
    for values in (*found.values(), *seconds.values()):
        values.clear()
    benchmark.pedantic(all_numbers, rounds=1 if options.quick else options.turns(3), iterations=1)
    an_image = {slots: Times.of([value / count for value in seconds[slots]]) for slots in numbers}
    for slots in numbers:
        suite.row(
            "latency", batch=slots, shape=flow.shape, dtype=torch.float32, ours=an_image[slots], peer="one slot",
            theirs=an_image[1], slots=slots, requests=len(found[slots]), method="rbf", budget=budget,
            images_s=1000 / an_image[slots].median, micro_batch=min(32, 2 * slots),
            **{f"p{round(100 * share)}_ms": 1e3 * percentile(found[slots], share) for share in (0.5, 0.95, 0.99)},
        )  # fmt: skip
