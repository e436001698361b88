"""Best-of-n: independent trajectories, the best final reward wins. The baseline to beat."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flowfast.flow.schedule import Schedule
from flowfast.methods.base import ODE, Chosen, Method, register
from flowfast.methods.plan import Plan, count_of, need


@register
@dataclass(frozen=True, kw_only=True)
class BestOfN(Method):
    """Best-of-n: independent runs (ODE by default), best final reward. Target: the model's own distribution, maximum
    of n.

    Rule: n = budget // NFE of one run.
    """

    name: ClassVar[str] = "bon"
    branches: ClassVar[bool] = False
    path: ClassVar[dict[str, Any]] = ODE
    wave: ClassVar[int | None] = 1

    n: Chosen = None

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        T, each = schedule.transitions, schedule.nfe
        need(self.name, budget, each)
        n = count_of(self.n or chains, budget // each, budget // each, "best-of-n's n (chains)")
        return Plan(chains=n, lanes=1, quota=[[1] * T] * n, left=[each] * n, accept=[False] * T)


@register
@dataclass(frozen=True, kw_only=True)
class PlainSample(BestOfN):
    """One plain sample of the model, no search: what the model gives by itself (ODE by default). Target: the model's
    own distribution."""

    name: ClassVar[str] = "ode"
    wave: ClassVar[int | None] = None

    n: Chosen = 1
