"""Rollover budget forcing (Kim et al. 2025, arXiv 2503.19385, Algorithms 1 and 2), as in the paper and as in its
public code."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule, ScheduleSpec, build_schedule
from flowfast.methods.base import PAPER, Chosen, Margin, Method, Weights, register
from flowfast.methods.plan import Plan, cost, count_of, need, split
from flowfast.methods.svdd import chain_quotas

ALL_THAT_IS_LEFT = 1 << 40


@register
@dataclass(frozen=True, kw_only=True)
class RBF(Method):
    """RBF: a child better than the best reward so far is taken at once, its unused quota rolls over (arXiv
    2503.19385). Target: none stated; greedy.

    Rule: as SVDD's, N = 2 chains. A chain's own last noisy transition spends what it has left (`spend_last`), because
    handing it to a neighbour would make the path depend on how many lanes run; without it the rest is reported
    unspent. `margin` (0: the paper) is how much better a child must be to be taken at once: where the reward of a
    posterior mean rises along t by itself, most first children beat the best so far and little is searched early.
    """

    name: ClassVar[str] = "rbf"

    weights: Weights = ()
    spend_last: bool = True
    margin: Margin = 0.0

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        self.check(schedule)
        need(self.name, budget, schedule.nfe)
        n = count_of(chains, 2, budget // schedule.nfe, "RBF's chains")
        quota = chain_quotas(schedule, budget, n, list(self.weights))
        return self.forced(schedule, quota, lanes, self.spend_last, self.margin)

    @staticmethod
    def forced(schedule: Schedule, quota: list[list[int]], lanes: int | None, spend_last: bool, margin: float) -> Plan:
        T, last = schedule.transitions, max(k for k, noisy in enumerate(schedule.searchable.tolist()) if noisy)
        left = [cost(q, schedule.passes.tolist()) for q in quota]
        if spend_last:
            quota = [[ALL_THAT_IS_LEFT if k == last else q[k] for k in range(T)] for q in quota]
        accept = [0 < k <= last and not (spend_last and k == last) for k in range(T)]
        return Plan(
            chains=len(quota), lanes=lanes or 1, quota=quota, left=left, accept=accept, margin=margin, carry=True
        )


@register
@dataclass(frozen=True, kw_only=True)
class RBFOfficial(Method):
    """RBF as the paper's public code runs it: best of several initial noises, the last step takes the rest, returns
    its one-step posterior mean.

    Rule: 10 % of a chain's budget (at most 25) are initial noises; quota = what is left // (NFE of one run x chains)
    each. Unlike the public code it spends the budget to the end (that one stops 2 NFE short and
    drops its last step). `margin`: as RBF's.
    """

    name: ClassVar[str] = "rbf-official"
    path: ClassVar[dict[str, Any]] = PAPER

    init_candidates: Chosen = None
    margin: Margin = 0.0

    def schedule(self, spec: ScheduleSpec) -> Schedule:
        return build_schedule(replace(spec, tail=0))

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        self.check(schedule)
        T, passes, nfe = schedule.transitions, schedule.passes.tolist(), schedule.nfe
        need(self.name, budget, nfe)
        n = count_of(chains, 2, budget // nfe, "RBF's chains")
        own = budget // schedule.unit // n * schedule.unit  # a chain's, at least
        most = (own - nfe) // passes[0] + 1
        first = count_of(self.init_candidates, min(25, own // passes[0] // 10), most, "init_candidates")
        each = max(1, (budget - first * passes[0] * n) // (nfe * n))
        if first * passes[0] + (nfe - passes[0]) * each > own:
            raise OptionError(
                f"init_candidates {first} leave less than one evaluation a step of {own} NFE a chain: lower it"
            )
        quota = []
        for spend in split(budget, n, schedule.unit):
            of_chain = [first] + [each] * (T - 2)
            quota.append([*of_chain, (spend - cost(of_chain, passes[:-1])) // passes[-1]])
        plan = RBF.forced(schedule, quota, lanes, True, self.margin)
        return replace(plan, finished=[k == T - 1 for k in range(T)])
