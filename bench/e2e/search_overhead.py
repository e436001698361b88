"""The share of a search on `scenes` that is neither model nor decoder nor reward.

    python -m bench search_overhead

16 prompts in 16 slots, the model's default path, RBF. A run notes the arguments of every call of velocity, decode and
reward; the same calls are then made alone, one after the other, and nothing else. `ours_ms` is the whole call of
`flowfast.search`, the peer `alone` those calls, in turns; `fraction` = 1 - alone / whole, from the medians of both.
"""

from __future__ import annotations

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


class Watched(nn.Module):
    """A flow or reward that notes what it is called with."""

    def __init__(self, inner: Any, calls: list[Call]):
        super().__init__()
        self.inner, self.calls = inner, calls

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.inner, name)

    def note(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.calls.append((function, tuple(copied(argument) for argument in arguments)))
        return function(*arguments)

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.note(self.inner.velocity, x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        return self.note(self.inner.decode, x0)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.note(self.inner, images, t, cond)


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
    watched = flowfast.search(Watched(flow, calls), prompts, reward=Watched(reward, calls), **settings)

    def whole() -> Any:
        return flowfast.search(flow, prompts, reward=reward, **settings)

    def alone() -> None:
        for function, arguments in calls:
            function(*arguments)

    result = whole()
    assert [sample.reward for sample in result.samples] == [sample.reward for sample in watched.samples]
    velocities = sum(function == flow.velocity for function, _ in calls)
    passes = result.samples[0].nfe // result.samples[0].evaluations
    assert velocities * result.micro_batch == sum(sample.nfe for sample in result.samples) + result.rows_padded
    times = paired(benchmark, {"ours": whole, "alone": alone}, options.turns(9))
    ours, theirs = times["ours"], times["alone"]
    suite.row(
        "search_overhead", batch=count, shape=flow.shape, dtype=torch.float32, ours=ours, peer="alone", theirs=theirs,
        fraction=1 - theirs.median / ours.median, method="rbf", budget=budget, passes=passes, rounds=result.rounds,
        micro_batch=result.micro_batch, rows_padded=result.rows_padded,
    )  # fmt: skip
