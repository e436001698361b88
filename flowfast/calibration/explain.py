"""What a request will do, without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowfast.calibration.auto import decided, settled
from flowfast.calibration.bank import Bank
from flowfast.calibration.choose import Choice, Chosen, alive, is_default, options_of, passes_of
from flowfast.config import Picked, SearchConfig
from flowfast.errors import OptionError
from flowfast.methods.auto import AUTO
from flowfast.methods.plan import Plan
from flowfast.resolve import resolve
from flowfast.types import Flow


@dataclass(frozen=True)
class Step:
    """One transition of a plan."""

    t: float
    """Linear t of its posterior means."""
    chains: int
    candidates: int
    """Of all chains together, at most."""
    scored: bool
    passes: int
    nfe: int
    """Spent by then, at most."""


@dataclass(frozen=True)
class Explained:
    """A request, its plan, and what its calibration shows."""

    method: str
    """As it will run."""
    options: dict[str, Any]
    path: dict[str, Any]
    steps: tuple[Step, ...]
    picked: Picked | None
    """None: the method was named."""
    bank: Bank | None
    chosen: Chosen | None
    """At the last step of the ladder up to the budget."""

    @property
    def nfe(self) -> int:
        return self.steps[-1].nfe

    @property
    def scores(self) -> int:
        """Pictures that are decoded and scored."""
        return min(sum(step.candidates for step in self.steps if step.scored), self.nfe)

    @property
    def seconds(self) -> float | None:
        """By the times of the calibration."""
        if self.bank is None:
            return None
        return self.nfe * self.bank.seconds_row + self.scores * (self.bank.seconds_decode + self.bank.seconds_reward)

    @property
    def alternatives(self) -> dict[str, Choice]:
        """Others by what they are."""
        if self.chosen is None:
            return {}
        found = {"taken": self.chosen.taken, "best on the calibration": self.chosen.best}
        for choice in self.chosen.choices:  # the best first
            path = f"path {choice.route + 1}"
            if is_default(choice):
                found.setdefault(f"prune's default, {path}", choice)
            if not choice.cuts:
                found.setdefault(f"best-of-n, {path}", choice)
        return found


def explained(flow: Flow, reward: Any, config: SearchConfig) -> Explained:
    """Raises OptionError, BudgetError: the request cannot run."""
    if config.budget is None:
        raise OptionError("expected a budget in NFE, for only a search measures what seconds buy: give --budget")
    params, picked = settled(flow, reward, config.params, config.calibration)
    resolved = resolve(flow, params)
    plan = resolved.plan(config.budget)
    found = decided(flow, reward, config.params, config.calibration) if config.method == AUTO else ""
    bank, _, chosen = (None, None, None) if isinstance(found, str) else found
    steps = steps_of(plan, resolved.schedule.linear_time.tolist(), passes_of(resolved))
    options = params.method_options
    return Explained(params.method, options, options_of(resolved), steps, picked, bank, chosen)


def steps_of(plan: Plan, times: list[float], passes: list[int]) -> tuple[Step, ...]:
    """One a transition. Where a method may try as many candidates as it likes, what its chains may spend is the
    bound."""
    most, spent, found = sum(plan.left), 0, []
    for at, (time, each, chains) in enumerate(zip(times, passes, alive(plan), strict=True)):
        candidates = min(sum(of_chain[at] for of_chain in plan.quota), most // each)
        spent, scored = min(spent + candidates * each, most), not plan.scored or plan.scored[at]
        found.append(Step(t=time, chains=chains, candidates=candidates, scored=scored, passes=each, nfe=spent))
    return tuple(found)
