"""What the budgets of an archive are planned as, and how those of running requests were cut. It scripts."""

import torch
from torch import nn

from flowfast.archive.plans import Plans
from flowfast.errors import BudgetError, OptionError
from flowfast.methods.forecast import Planned, forecast
from flowfast.rounds.batch import Limits


class Budgets(nn.Module):
    """The plans of an archive, by budgets in NFE."""

    cut_rounds: list[list[int]]
    cut_nfe: list[list[int]]

    def __init__(self, plans: Plans, slots: int):
        super().__init__()
        self.quota, self.left = (torch.tensor(values, device="cpu") for values in (plans.quota, plans.left))
        self.start = torch.tensor(plans.start, device="cpu")
        self.lanes, self.keep, self.rounds, self.plan_of = plans.lanes, plans.keep, plans.rounds, plans.of
        self.early, self.regroup, self.scored = plans.early, plans.regroup, plans.scored
        self.passes, self.unit = plans.passes, plans.unit
        self.plan_at = [-1 for _ in range(slots)]  # of each slot's request
        self.cut_rounds = [[0][:0] for _ in range(slots)]
        self.cut_nfe = [[0][:0] for _ in range(slots)]

    @torch.jit.export
    def admit(self, slot: int, budget: int) -> Limits:
        """What a slot's new request may spend. Raises BudgetError."""
        plan = self.plan(budget)
        self.plan_at[slot] = plan
        self.cut_rounds[slot], self.cut_nfe[slot] = [0][:0], [0][:0]
        widths: list[int] = []
        scored: list[int] = []
        null: list[int] = []
        rounds = self.rounds[plan]
        for i in range(0, len(rounds), 4):
            widths += [rounds[i]] * rounds[i + 3]
            scored += [rounds[i + 1]] * rounds[i + 3]
            null += [rounds[i + 2]] * rounds[i + 3]
        return Limits(self.quota[plan], self.left[plan], self.start[plan], widths, scored, null)

    @torch.jit.export
    def cut(self, slot: int, at: int, nfe: int) -> Limits:
        """What it may spend from round `at` on, as Python's `Plan.forecast` has it. Raises OptionError."""
        if self.plan_at[slot] < 0 or nfe < 0:
            raise OptionError(
                "expected a slot with a request and at least 0 NFE, got slot " + str(slot) + " and "
                + str(nfe)
            )  # fmt: skip
        self.cut_rounds[slot].append(at)
        self.cut_nfe[slot].append(nfe)
        plan = self.plan_at[slot]
        quota: list[list[int]] = self.quota[plan].tolist()
        allowed: list[int] = self.left[plan].tolist()
        start: list[bool] = self.start[plan].tolist()
        planned = Planned(
            self.lanes[plan],
            quota,
            allowed,
            start,
            self.early,
            self.regroup,
            self.scored,
            self.passes,
            self.keep[plan],
        )
        found = forecast(planned, self.cut_rounds[slot], self.cut_nfe[slot])
        left = torch.tensor(found.left, device="cpu")
        quota_left = torch.tensor(found.quota, device="cpu")
        return Limits(quota_left, left, left > 0, found.widths, found.scored, found.null)

    @torch.jit.export
    def rounds_of(self, budget: int) -> int:
        """Rounds of a budget, at most. Raises BudgetError."""
        rounds, found = self.rounds[self.plan(budget)], 0
        for i in range(3, len(rounds), 4):
            found += rounds[i]
        return found

    @torch.jit.export
    def within(self, budget: int, rounds: int) -> int:
        """The largest budget up to this one that takes at most so many rounds; the smallest one where none does. Raises
        BudgetError."""
        if self.rounds_of(budget) <= rounds:
            return budget
        least = budget
        for units in range(budget // self.unit - 1, -1, -1):
            if self.plan_of[units] >= 0:
                least = units * self.unit
                if self.rounds_of(least) <= rounds:
                    return least
        return least

    def plan(self, budget: int) -> int:
        """The number of the plan that a budget has. Raises BudgetError, with the nearest budgets that run."""
        plan_of, unit = self.plan_of, self.unit
        units, most = budget // unit, len(plan_of) - 1
        if budget >= 0 and units <= most and plan_of[units] >= 0:
            return plan_of[units]
        below, above = min(max(units, -1), most), max(units, 0)
        while below >= 0 and plan_of[below] < 0:
            below -= 1
        while above <= most and plan_of[above] < 0:
            above += 1
        near: list[str] = []
        if below >= 0:
            near.append(str(below * unit))
        if above <= most:
            near.append(str(above * unit))
        raise BudgetError(
            "this archive cannot run a budget of " + str(budget) + " NFE: choose " + " or ".join(near)
            + ", or export it with another --budget"
        )  # fmt: skip
