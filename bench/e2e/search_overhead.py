"""The share of a search on `scenes` that is neither model nor decoder nor reward.

    python -m bench search_overhead

16 prompts in 16 slots, the model's default path, RBF. `fraction` = 1 - (seconds inside velocity, decode and reward) /
(seconds of the whole call of `flowfast.search`), both of the same calls, the median over turns. The peer `alone` makes
the same calls of velocity, decode and reward one after the other with nothing between them; `fraction_alone` compares
the two medians, and also holds what the machine's speed varies by.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flowfast
from bench.timing import Suite, paired
from flowfast import rewards
from flowfast.models.scenes import hard_prompts

PROMPTS = 16
Call = tuple[Callable[..., Any], tuple[Any, ...]]


class Wrapped(nn.Module):
    """A flow or reward whose calls go through `run(function, *arguments)`."""

    def __init__(self, inner: Any, run: Callable[..., Any]):
        super().__init__()
        self.inner, self.run = inner, run

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.run(self.inner.velocity, x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        return self.run(self.inner.decode, x0)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.run(self.inner, images, t, cond)


def copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: entry.clone() for name, entry in value.items()}
    return value.clone()


def test_search_overhead(benchmark: Any, suite: Suite) -> None:
    options = suite.options
    count, budget = (4, 24) if options.quick else (PROMPTS, 100)
    flow, reward, prompts = flowfast.load("scenes"), rewards.load("scenes"), hard_prompts("tuning")[:count]
    settings = {"method": "rbf", "budget": budget, "slots": count, "micro_batch": count}
    calls: list[Call] = []
    inside = [0.0]
    fractions: list[float] = []

    def note(function: Callable[..., Any], *arguments: Any) -> Any:
        calls.append((function, tuple(copied(argument) for argument in arguments)))
        return function(*arguments)

    def clocked(function: Callable[..., Any], *arguments: Any) -> Any:
        start = time.perf_counter()
        answer = function(*arguments)
        inside[0] += time.perf_counter() - start
        return answer

    def search(run: Callable[..., Any]) -> Any:
        return flowfast.search(Wrapped(flow, run), prompts, reward=Wrapped(reward, run), **settings)

    def whole() -> Any:
        inside[0], start = 0.0, time.perf_counter()
        result = search(clocked)
        fractions.append(1 - inside[0] / (time.perf_counter() - start))
        return result

    def alone() -> None:
        for function, arguments in calls:
            function(*arguments)

    watched, result = search(note), whole()
    assert [sample.reward for sample in result.samples] == [sample.reward for sample in watched.samples]
    velocities = sum(function == flow.velocity for function, _ in calls)
    passes = result.samples[0].nfe // result.samples[0].evaluations
    assert velocities * result.micro_batch == sum(sample.nfe for sample in result.samples) + result.rows_padded
    times = paired(benchmark, {"ours": whole, "alone": alone}, options.turns(9))
    ours, theirs = times["ours"], times["alone"]
    suite.row(
        "search_overhead", batch=count, shape=flow.shape, dtype=torch.float32, ours=ours, peer="alone", theirs=theirs,
        fraction=statistics.median(fractions), fraction_alone=1 - theirs.median / ours.median, method="rbf",
        budget=budget, passes=passes, rounds=result.rounds, micro_batch=result.micro_batch,
        rows_padded=result.rows_padded,
    )  # fmt: skip
