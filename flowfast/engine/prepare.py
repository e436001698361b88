"""From a request to a job: what its params mean on this model, its plan, what model and reward know of its prompt, and
with whom it may share a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch

from flowfast.config import SearchParams
from flowfast.engine.loaded import Loaded
from flowfast.engine.request import Job, Request
from flowfast.errors import BudgetError, FlowfastError, OptionError
from flowfast.methods.forecast import Forecast
from flowfast.methods.plan import Plan
from flowfast.resolve import Resolved, checked_latents, resolve
from flowfast.types import Conditions

OWN = {"seed", "repeat", "budget", "until", "negative_prompt"}
"""What requests of one batch may differ in, beside guidance scales of as many passes."""


@dataclass(frozen=True)
class Known:
    """Conditions that are known already, of one prompt each."""

    cond: Conditions
    null_cond: Conditions
    reward_cond: Conditions


class Preparer:
    """Makes jobs; what requests have in common is worked out once."""

    def __init__(self, loaded: Loaded, max_budget: int):
        """max_budget: batches have room for it, so that requests of smaller ones fit into them."""
        self.loaded, self.max_budget = loaded, max_budget
        self._resolved: dict[str, tuple[Resolved, str]] = {}
        self._plans: dict[tuple[str, int], tuple[Plan, Forecast]] = {}
        self._rooms: dict[tuple[str, int], tuple[Plan, Hashable]] = {}
        self._null: dict[str, Conditions] = {}

    def resolved(self, params: SearchParams) -> tuple[Resolved, str]:
        """And the digest of all that a batch shares of it."""
        key = params.model_dump_json(exclude=OWN)
        if key not in self._resolved:
            found = resolve(self.loaded.original, params)
            self._resolved[key] = (found, digest(found))
        return self._resolved[key]

    def known(self, request: Request, passes: int) -> Known:
        """Encodes one prompt alone, as it is with any others."""
        steered = request.params.gradient is not None
        cond = self.loaded.encode([request.prompt])
        negative = request.params.negative_prompt
        if passes == 2 and negative not in self._null:
            self._null[negative] = self.loaded.flow.encode([negative])
        null = self._null[negative] if passes == 2 else {}
        return Known(cond, null, self.loaded.encode_for_reward(request.reward, [request.prompt], steered))

    def job(self, request: Request, number: int, now: float, known: Known | None = None) -> Job:
        """Raises FlowfastError: what is asked for does not exist, or does not go together."""
        self.loaded.reward(request.reward)
        resolved, shared = self.resolved(request.params)
        budget = request.params.budget
        if request.params.seconds is not None:
            raise OptionError("seconds are for flowfast.search: give a budget in NFE and a deadline")
        if budget is None:
            raise OptionError("expected a budget in NFE, got none; where time is short, give a deadline beside it")
        if budget > self.max_budget:
            raise BudgetError(f"this engine runs budgets of up to {self.max_budget} NFE, got {budget}: lower it")
        plan, forecast = self.plan(resolved, shared, budget)
        room, kind = self.room(resolved, shared, budget, plan)
        known = known or self.known(request, resolved.passes)
        if request.latents is not None:
            checked_latents(request.latents[None], 1, self.loaded.original, resolved, plan)
        shapes = [
            [(name, value.dtype, *value.shape[1:]) for name, value in cond.items()]
            for cond in (known.cond, known.null_cond, known.reward_cond)
        ]
        due = None if request.deadline is None else now + request.deadline
        kind = (request.reward, kind, repr(shapes))
        conds = (known.cond, known.null_cond, known.reward_cond)
        return Job(request, number, now, resolved, plan, room, forecast, *conds, kind, due)

    def plan(self, resolved: Resolved, shared: str, budget: int) -> tuple[Plan, Forecast]:
        key = (shared, budget)
        if key not in self._plans:
            plan = resolved.plan(budget)
            self._plans[key] = (plan, plan.forecast())
        return self._plans[key]

    def room(self, resolved: Resolved, shared: str, budget: int, plan: Plan) -> tuple[Plan, Hashable]:
        """The plan of the batch that it goes into, and the name of such batches."""
        key = (shared, budget)
        if key not in self._rooms:
            try:
                largest = resolved.plan(self.max_budget)
            except FlowfastError:  # more chains than a batch may have
                largest = plan
            if plan.fits(largest):
                self._rooms[key] = (largest, shared)
            else:  # fewer chains of those that are regrouped: a batch of their own
                self._rooms[key] = (plan, f"{shared} {plan.chains} {plan.lanes} {digest_of(plan)}")
        return self._rooms[key]


def digest(resolved: Resolved) -> str:
    """Of what all requests of a batch have in common."""
    schedule, params = resolved.schedule, resolved.params
    times = torch.cat([schedule.table, schedule.time[:, None], schedule.linear_time[:, None]], 1)
    facts: Any = (
        resolved.method, resolved.passes, params.gradient, params.top_k, params.finalists, params.score_all,
        params.chains, params.lanes, schedule.finished.tolist(), schedule.searchable.tolist(),
    )  # fmt: skip
    return hashlib.blake2b(times.cpu().numpy().tobytes() + repr(facts).encode(), digest_size=16).hexdigest()


def digest_of(plan: Plan) -> str:
    """Of the rules that its chains go by."""
    rules = (plan.accept, plan.margin, plan.carry, plan.regroup, plan.groups, plan.finished, plan.scored)
    return hashlib.blake2b(repr(rules).encode(), digest_size=16).hexdigest()
