"""A budget in seconds, before the search begins: what a micro-batch takes, and the largest budget in NFE that fits."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch

from flowfast.config import SearchConfig
from flowfast.engine import clock
from flowfast.engine.deadline import Pace, known_pace, largest_budget
from flowfast.engine.loaded import Loaded
from flowfast.engine.maker import BATCH_CAPS, LiveMaker
from flowfast.engine.prepare import Known
from flowfast.engine.request import Job, Request
from flowfast.engine.runner import LiveRunner
from flowfast.errors import BudgetError
from flowfast.methods.plan import Plan
from flowfast.resolve import Resolved, fitting_rows
from flowfast.rounds.steered import frozen


@dataclass(frozen=True)
class Measured:
    """What was found out."""

    budget: int
    pace: Pace
    key: Any
    """By which the pace of the search is kept for later ones; None: it is not."""
    config: SearchConfig
    """With the micro-batch that fits, where the first one did not."""
    started: float | None
    """When the search begins after all, where the first micro-batch did not fit."""
    seconds: float
    """That it took."""


def micro_batch_of(loaded: Loaded, config: SearchConfig, plan: Plan, slots: int) -> int:
    """Rows of a model call of `flowfast.search`: as configured, else as many as a round of a batch fills, at most
    32."""
    fitting = min(fitting_rows(slots, plan), BATCH_CAPS.get(loaded.original, 32))
    return config.micro_batch or fitting


def measure(
    loaded: Loaded, make: LiveMaker, config: SearchConfig, resolved: Resolved, prompts: list[str], known: Known,
    seconds: float, pace_name: str | None,
) -> Measured:  # fmt: skip
    """The largest budget whose rounds fit into `seconds` a prompt. pace_name: names the reward if its pace may be kept,
    else None. Raises BudgetError where that is too short."""
    if not seconds > 0:
        raise BudgetError(f"seconds must be positive, got {seconds}: raise it")
    before, started = clock.now(), None
    probe = resolved.plan(16 * resolved.schedule.nfe)
    slots = make.usual_slots(config.reward, probe.forecast())
    everywhere = replace(probe, scored=[])
    request = Request(id="", prompt=prompts[0], params=config.params, reward=config.reward)
    conds = (known.cond, known.null_cond, known.reward_cond)
    job = Job(request, 0, 0.0, resolved, everywhere, everywhere, everywhere.forecast(), *conds, "")
    while True:
        rows = micro_batch_of(loaded, config, probe, slots)
        key = None if pace_name is None else key_of(pace_name, config, slots, rows)
        try:
            with frozen(*() if config.gradient is None else (loaded.original, loaded.scorers[config.reward])):
                pace = known_pace(loaded.original, key) or timed(loaded, job, slots, rows, all(probe.scored))
            break
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        make.ran_out(rows, rows // 2)
        config = config.model_copy(update={"micro_batch": rows // 2})
        before = started = clock.now()  # nothing but the measuring of a round had begun
    budget = largest_budget(resolved, seconds, pace, prompts=len(prompts), slots=slots, micro_batch=rows)
    return Measured(budget, pace, key, config, started, clock.now() - before)


def key_of(name: str, config: SearchConfig, slots: int, rows: int) -> Any:
    """What searches must have in common for the pace of one to be that of the other."""
    facts = config.model_dump_json(
        exclude={"seed", "repeat", "first_chain", "seconds", "until", "top_k", "negative_prompt", "cuts", "picked"}
    )
    return (name, facts, slots, rows, torch.get_num_threads())


@torch.no_grad()
def timed(loaded: Loaded, job: Job, slots: int, rows: int, everywhere: bool) -> Pace:
    """What a micro-batch takes with all that goes with it, in a few rounds, of which the first half is decoded and
    scored; everywhere: all of them, as all rounds of the search are."""
    runner, times = LiveRunner(loaded, job, slots=slots, micro_batch=rows), list[tuple[float, int, int]]()
    for slot in range(slots):
        runner.admit(slot, job)
    rounds = min(8, len(job.forecast.widths))
    half = rounds if everywhere else (rounds + 1) // 2
    for each in range(rounds):
        if each == half:
            for slot, widths in enumerate(runner.engine.plans):
                runner.engine.expect(slot, widths, [0] * len(widths), runner.engine.null_plans[slot])
        start = clock.now()
        runner.start([job] * slots)
        runner.finish()
        if loaded.device.type == "cuda":
            torch.cuda.synchronize()
        times.append((clock.now() - start, runner.rows[0] // rows, runner.rows[1] // rows))
    loaded.clock = clock.Clock(loaded.device)
    # Warm and undisturbed.
    scored = min(seconds / calls for seconds, calls, _ in times[:half])
    unscored = min((seconds / calls for seconds, calls, _ in times[half:]), default=math.inf)
    if unscored >= scored:
        return Pace(scored, 0.0)
    return Pace(unscored, min((seconds / unscored - calls) / each for seconds, calls, each in times[:half]))
