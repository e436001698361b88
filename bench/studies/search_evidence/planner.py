"""What a budget buys, what that costs, and which budget of one method costs what best-of-n's does."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch

from bench.studies.search_evidence.design import PATHS, Arm, Study
from flowfast import rewards
from flowfast.calibration.auto import settled_config
from flowfast.errors import BudgetError, FlowfastError
from flowfast.methods.plan import Plan
from flowfast.pool.wave import wave_of
from flowfast.report.machine import processor
from flowfast.resolve import Resolved, resolve
from flowfast.types import Flow


@dataclass(frozen=True)
class Costs:
    """Milliseconds of one row of a full micro-batch, on one thread."""

    model_ms: float
    reward_ms: float
    decode_ms: float
    processor: str

    def of(self, work: Work) -> float:
        """Milliseconds of a prompt."""
        return work.nfe * self.model_ms + work.rewards * self.reward_ms + work.decodes * self.decode_ms


class Work(NamedTuple):
    """What a search does for one prompt: rows through the model, through the reward, through the decoder."""

    nfe: float
    rewards: float
    decodes: float


@dataclass(frozen=True)
class Planner:
    """What budgets buy on a flow, and cost."""

    flow: Flow
    study: Study
    costs: Costs

    @cached_property
    def reward(self) -> Any:
        return rewards.load("scenes", self.flow)

    @cache  # noqa: B019 (a planner lives as long as its run)
    def plan(self, arm: Arm, budget: int) -> tuple[Resolved, Plan]:
        """Raises OptionError, BudgetError."""
        config = settled_config(self.flow, self.reward, self.study.config(arm, budget))
        resolved = resolve(self.flow, config.params)
        if config.pool:
            return resolved, resolved.plan(wave_of(resolved, config, budget).nfe)
        return resolved, resolved.plan(budget)

    def work(self, arm: Arm, budget: int) -> Work:
        """What a search with this budget does, at most; where prompts share theirs, one of them in the mean."""
        of_plan = work_of(self.plan(arm, budget)[1])
        waves = budget / of_plan.nfe if self.study.config(arm, budget).pool else 1
        return Work(*(waves * count for count in of_plan))

    def cost(self, arm: Arm, budget: int) -> float:
        """Milliseconds a prompt."""
        return self.costs.of(self.work(arm, budget))

    def why_not(self, arm: Arm) -> str | None:
        """Why an arm cannot run; None: it can."""
        try:
            self.plan(arm, max(self.study.budgets))
        except FlowfastError as error:
            return str(error)
        return None

    def runs(self, arm: Arm, budget: int) -> bool:
        """Is the budget enough for one sample?"""
        try:
            self.plan(arm, budget)
        except BudgetError:
            return False
        return True

    @cache  # noqa: B019
    def at_cost(self, arm: Arm, budget: int) -> int | None:
        """The largest budget of the arm that costs no more than its baseline with `budget`; `budget` itself where
        that plans the same search. None: no search is as cheap."""
        if arm == arm.baseline:
            return budget
        most = self.cost(arm.baseline, budget)
        for nfe in range(math.floor(most / self.costs.model_ms), 0, -1):
            if not self.runs(arm, nfe):
                return None
            if self.cost(arm, nfe) <= most:
                same = self.runs(arm, budget) and self.facts(arm, nfe) == self.facts(arm, budget)
                return budget if same else nfe
        return None

    def facts(self, arm: Arm, budget: int) -> dict[str, Any]:
        """What a search with this budget is, to tell rows of one search from those of another of the same name."""
        resolved, plan = self.plan(arm, budget)
        method = resolved.method
        options = {field.name: getattr(method, field.name) for field in fields(method)}
        changed = {name: value for name, value in options.items() if value != getattr(type(method)(), name)}
        work = self.work(arm, budget)
        return {
            "path": PATHS[arm.path],
            "method": method.name,
            "options": {name: list(value) if isinstance(value, tuple) else value for name, value in changed.items()},
            "times": [round(time, 4) for time in resolved.schedule.linear_time.tolist()],
            "chains": plan.chains,
            "nfe": int(work.nfe),
            "rewards": int(work.rewards),
            **({"wave": int(work_of(plan).nfe)} if self.study.config(arm, budget).pool else {}),
        }


def work_of(plan: Plan) -> Work:
    """What a plan does at most, for one prompt; the sample that is handed out is decoded once more."""
    forecast = plan.forecast()
    nfe, rewards = sum(forecast.widths) + sum(forecast.null), sum(forecast.scored)
    if any(plan.accept):  # what rounds hold are bounds then; every child is scored
        nfe = min(nfe, sum(plan.left))
        rewards = min(rewards, sum(plan.left) // min(plan.passes))
    return Work(nfe, rewards, rewards + 1)


@torch.no_grad()
def measured(flow: Flow, study: Study, repeats: int = 51) -> Costs:
    """Medians over `repeats` calls of model, reward and decoder, which take turns, at the study's micro-batch.

    Of processor time, which on one thread is the clock's on a machine that does nothing else."""
    reward: Any = rewards.load("scenes", flow)
    rows = study.micro_batch
    prompts = [study.prompts[row % len(study.prompts)] for row in range(rows)]
    cond, asked = flow.encode(prompts), reward.encode(prompts)
    x, t = torch.randn(rows, *flow.shape, generator=torch.Generator().manual_seed(0)), torch.full((rows,), 0.5)
    images = flow.decode(x)
    calls: dict[str, Callable[[], object]] = {
        "model_ms": lambda: flow.velocity(x, t, cond),
        "reward_ms": lambda: reward(images, t, asked),
        "decode_ms": lambda: flow.decode(x),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 2):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if turn >= 2:  # the first ones warm up
                times[name].append(1e3 * (time.thread_time() - start) / rows)
    return Costs(**{name: statistics.median(found) for name, found in times.items()}, processor=processor())
