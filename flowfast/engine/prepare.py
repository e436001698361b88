"""From a request to a job: what its params mean on this model, its plan, what model and reward know of its prompt, and
with whom it may share a batch."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import torch

from flowfast.calibration.auto import applied, settled
from flowfast.config import Picked, SearchParams
from flowfast.engine.loaded import Loaded
from flowfast.engine.request import Job, Request
from flowfast.errors import BudgetError, FlowfastError, OptionError
from flowfast.methods.auto import AUTO
from flowfast.methods.forecast import Forecast
from flowfast.methods.plan import Plan
from flowfast.resolve import Resolved, checked_latents, fitting_rows, resolve
from flowfast.types import Conditions

OWN = {"seed", "repeat", "first_chain", "budget", "until", "negative_prompt"}
"""What requests of one batch may differ in, beside guidance scales that need as many passes at each transition."""
MOST_ALONE = 8
"""Rows of a model call on a CPU where none are given: more of them save little there (3.5 ms a row of `scenes` alone,
1.8 in eight, 1.6 in sixteen), and padding costs as much as other rows."""
MOST_KEPT = 512
"""Of each of the things that requests have in common."""
K = TypeVar("K")
V = TypeVar("V")


@dataclass(frozen=True)
class Known:
    """Conditions that are known already, of one prompt each."""

    cond: Conditions
    null_cond: Conditions
    reward_cond: Conditions


class Preparer:
    """Makes jobs; what requests have in common is worked out once."""

    def __init__(self, loaded: Loaded, max_budget: int, lone: bool = False, calibration: str | None = None):
        """max_budget: batches have room for it, so that requests of smaller ones fit into them. lone: on a CPU, a
        request shares model calls of no more rows than it fills by itself. calibration: a file for method auto."""
        self.loaded, self.max_budget, self.lone, self.calibration = loaded, max_budget, lone, calibration
        self._picked: Recent[tuple[str, str, int | None], Picked | None] = Recent()
        self._resolved: Recent[str, tuple[Resolved, str]] = Recent()
        self._plans: Recent[tuple[str, int], tuple[Plan, Forecast]] = Recent()
        self._rooms: Recent[tuple[str, int], tuple[Plan, Hashable]] = Recent()
        self._null: Recent[str, Conditions] = Recent()

    def resolved(self, params: SearchParams) -> tuple[Resolved, str]:
        """And the digest of all that a batch shares of it."""

        def make() -> tuple[Resolved, str]:
            found = resolve(self.loaded.original, params)
            return found, digest(found)

        return self._resolved.get(params.model_dump_json(exclude=OWN), make)

    def known(self, request: Request, passes: int) -> Known:
        """Encodes one prompt alone, as it is with any others."""
        steered = request.params.gradient is not None
        cond = self.loaded.encode([request.prompt])
        negative = request.params.negative_prompt
        null = self._null.get(negative, lambda: self.loaded.flow.encode([negative])) if passes == 2 else {}
        return Known(cond, null, self.loaded.encode_for_reward(request.reward, [request.prompt], steered))

    def job(self, request: Request, number: int, now: float, known: Known | None = None) -> Job:
        """Raises FlowfastError: what is asked for does not exist, or does not go together."""
        self.loaded.reward(request.reward)
        budget = request.params.budget
        if request.params.seconds is not None:
            raise OptionError("seconds are for flowfast.search: give a budget in NFE and a deadline")
        if budget is None:
            raise OptionError("expected a budget in NFE, got none; where time is short, give a deadline beside it")
        if budget > self.max_budget:
            raise BudgetError(f"this engine runs budgets of up to {self.max_budget} NFE, got {budget}: lower it")
        request = self.settled(request)
        resolved, shared = self.resolved(request.params)
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
        fits = self.lone and self.loaded.device.type == "cpu"
        rows = min(MOST_ALONE, fitting_rows(1, plan)) if fits else None
        kind = (request.reward, kind, repr(shapes), rows)
        conds = (known.cond, known.null_cond, known.reward_cond)
        return Job(request, number, now, resolved, plan, room, forecast, *conds, kind, due=due, rows=rows)

    def settled(self, request: Request) -> Request:
        """With a concrete method in place of auto. Raises OptionError, BudgetError."""
        params = request.params
        if params.method != AUTO:
            return request
        reward = self.loaded.reward(request.reward)

        def make() -> Picked | None:
            return settled(self.loaded.original, reward, params, self.calibration)[1]

        key = (params.model_dump_json(exclude=OWN), request.reward, params.budget)
        picked = self._picked.get(key, make)
        assert picked is not None
        return replace(request, params=applied(params, picked), picked=picked)

    def plan(self, resolved: Resolved, shared: str, budget: int) -> tuple[Plan, Forecast]:
        def make() -> tuple[Plan, Forecast]:
            plan = self._as_in_a_batch(resolved.plan(budget), self._largest(resolved))
            return plan, plan.forecast()

        return self._plans.get((shared, budget), make)

    def _largest(self, resolved: Resolved) -> Plan | None:
        """The plan of a batch with room for all budgets; None: it would have more chains than a batch may."""
        try:
            return resolved.plan(self.max_budget)
        except FlowfastError:
            return None

    def _as_in_a_batch(self, plan: Plan, largest: Plan | None) -> Plan:
        """A small budget has fewer children that compete, so that fewer of its scores are read than of a large one's.
        Where all are scored that a large one reads, which changes no decision, both share a batch."""
        if largest is None or any(plan.regroup) or not plan.scored or not largest.scored:
            return plan
        more = all(big or not small for small, big in zip(plan.scored, largest.scored, strict=True))
        alike = replace(plan, scored=largest.scored)
        return alike if more and alike.fits(largest) else plan

    def room(self, resolved: Resolved, shared: str, budget: int, plan: Plan) -> tuple[Plan, Hashable]:
        """The plan of the batch that it goes into, and the name of such batches."""

        def make() -> tuple[Plan, Hashable]:
            largest = self._largest(resolved)
            if largest is not None and plan.fits(largest):
                return largest, shared
            # Fewer chains of those that are regrouped: a batch of their own.
            return plan, f"{shared} {plan.chains} {plan.lanes} {digest_of(plan)}"

        return self._rooms.get((shared, budget), make)


class Recent(Generic[K, V]):
    """What was asked for last, so that an engine that runs for months keeps little."""

    def __init__(self) -> None:
        self.kept: OrderedDict[K, V] = OrderedDict()

    def get(self, key: K, make: Callable[[], V]) -> V:
        if key not in self.kept:
            self.kept[key] = make()
            if len(self.kept) > MOST_KEPT:
                self.kept.popitem(last=False)
        self.kept.move_to_end(key)
        return self.kept[key]


def digest(resolved: Resolved) -> str:
    """Of what all requests of a batch have in common."""
    schedule, params = resolved.schedule, resolved.params
    times = torch.cat([schedule.table, schedule.time[:, None], schedule.linear_time[:, None]], 1)
    facts: Any = (
        resolved.method, schedule.passes.tolist(), params.gradient, params.top_k, params.finalists, params.score_all,
        params.chains, params.lanes, schedule.finished.tolist(), schedule.searchable.tolist(),
    )  # fmt: skip
    return hashlib.blake2b(times.cpu().numpy().tobytes() + repr(facts).encode(), digest_size=16).hexdigest()


def digest_of(plan: Plan) -> str:
    """Of the rules that its chains go by."""
    rules = (plan.accept, plan.margin, plan.carry, plan.regroup, plan.groups, plan.finished, plan.scored)
    return hashlib.blake2b(repr(rules).encode(), digest_size=16).hexdigest()
