"""A reward on the host beside the model: two batches in turns against one.

    python -m bench host_reward

`scenes`, 16 prompts in 16 slots, RBF, micro-batches of 16; the reward answers after as long as the model takes for its
batch, as a reward on another machine does (it sleeps). `ours_ms` is the whole call with `overlap`, the peer
`one batch` the same without; results are the same. `waits` is the share of the call that the engine waited for the
reward. At best a call takes half of the time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import flowfast
from bench.timing import Suite, paired
from flowfast.models.scenes import hard_prompts

PROMPTS = 16


def test_host_reward(benchmark: Any, suite: Suite) -> None:
    options = suite.options
    count, budget = (4, 24) if options.quick else (PROMPTS, 60)
    flow, prompts = flowfast.load("scenes"), hard_prompts("tuning")[:count]
    half = count // 2
    start = time.perf_counter()
    settings = {"method": "rbf", "budget": budget, "slots": count, "micro_batch": half}
    plain = flowfast.search(flow, prompts, reward=lambda images, texts: images.mean((1, 2, 3)), **settings)
    seconds_a_batch = (time.perf_counter() - start) * half / sum(sample.nfe for sample in plain.samples)
    passes = plain.samples[0].nfe // plain.samples[0].evaluations
    waits: list[float] = []

    def reward(images: Tensor, texts: Sequence[str]) -> Tensor:
        time.sleep(seconds_a_batch * passes * len(images) / half)
        return images.mean((1, 2, 3))

    def run(overlap: bool) -> flowfast.SearchResult:
        result = flowfast.search(flow, prompts, reward=reward, overlap=overlap, **settings)
        if overlap:
            waits.append(result.seconds["reward"] / result.seconds["total"])
        return result

    one, other = run(True), run(False)
    assert [sample.winner for sample in one.samples] == [sample.winner for sample in other.samples]
    times = paired(benchmark, {"ours": lambda: run(True), "one batch": lambda: run(False)}, options.turns(5))
    suite.row(
        "host_reward", batch=count, shape=flow.shape, dtype=torch.float32, ours=times["ours"], peer="one batch",
        theirs=times["one batch"], waits=statistics.median(waits), reward_ms_a_batch=1e3 * seconds_a_batch * passes,
    )  # fmt: skip
