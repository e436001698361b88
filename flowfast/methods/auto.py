"""Method auto: whatever spends the budget best, as far as anyone knows (flowfast/calibration/auto.py)."""

from dataclasses import dataclass
from typing import Any, ClassVar

from flowfast.flow.schedule import Schedule
from flowfast.methods.base import ODE, Chains, Method, register
from flowfast.methods.plan import Plan
from flowfast.methods.prune import Prune

AUTO = "auto"


@register
@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """What spends the budget best: cuts and path by a calibration (`flowfast calibrate`) where model and reward have
    one, else prune; best-of-n where a reward is blind. Target: the model's own distribution, maximum of n.

    Rule: that of what is taken, which a search knows before it begins (`picked`). As it stands here it is prune's.
    """

    name: ClassVar[str] = AUTO
    branches: ClassVar[bool] = False
    path: ClassVar[dict[str, Any]] = ODE

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        return Prune().plan(schedule, budget, chains, lanes)

    def module(self, plan: Plan, slots: int) -> Chains:
        return Prune().module(plan, slots)
