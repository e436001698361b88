"""Search over paths (Ma et al. 2025, arXiv 2501.09732): re-noise forward, denoise back, keep the best."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flowfast.flow.schedule import Schedule, ScheduleSpec, search_over_paths_schedule
from flowfast.methods.base import ODE, Chains, Chosen, LinearTime, Method, Positive, register
from flowfast.methods.plan import Plan, count_of, need


class BestN(Chains):
    """After a block the best n chains survive in their places; the others are copied from them in turn."""

    def __init__(self, n: int, regroup: Tensor):
        super().__init__(regroups=True)
        self.n = n
        self.at: Tensor
        self.register_buffer("at", regroup, persistent=False)

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        S, C = rewards.size(0), rewards.size(1)
        index = torch.arange(C, device=rewards.device).expand(S, C)
        winners = torch.sort(torch.sort(rewards, dim=1, descending=True, stable=True)[1][:, : self.n], dim=1)[0]
        survives = torch.zeros([S, C], dtype=torch.uint8, device=rewards.device).scatter(1, winners, 1)
        losers = torch.sort(survives, dim=1, descending=False, stable=True)[1][:, : C - self.n]
        parents = winners.gather(1, (torch.arange(C - self.n, device=rewards.device) % self.n).expand(S, C - self.n))
        now = torch.logical_and(moved, self.at.index_select(0, transition))
        return torch.where(now.unsqueeze(1), index.scatter(1, losers, parents), index)


@register
@dataclass(frozen=True, kw_only=True)
class SearchOverPaths(Method):
    """SoP: ODE down to t_start, then K times: noise up by `forward`, ODE down by `backward`, keep the best N (arXiv
    2501.09732). Target: none stated; greedy.

    Rule: N = 2 (1 where that leaves K < 2); K = what the budget leaves for each of the N after the way down, over the
    transitions that follow.
    """

    name: ClassVar[str] = "sop"
    path: ClassVar[dict[str, Any]] = ODE

    t_start: LinearTime = 0.5
    forward: LinearTime = 0.2
    backward: LinearTime = 0.4
    width: Positive = 0.15
    k: Chosen = None

    def schedule(self, spec: ScheduleSpec) -> Schedule:
        return search_over_paths_schedule(
            spec, t_start=self.t_start, forward=self.forward, backward=self.backward, width=self.width
        ).schedule

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        T = schedule.transitions
        noisy = schedule.searchable.tolist()
        ups = [k for k in range(1, T) if noisy[k]]
        down = int(schedule.passes[: ups[0]].sum())  # NFE of the way down, once for each of the N
        rest = schedule.nfe - down
        need(self.name, budget, down + 2 * rest)
        n = count_of(chains, 2 if budget >= 2 * (down + 2 * rest) else 1, budget // schedule.nfe, "SoP's chains (N)")
        k = count_of(self.k, (budget - n * down) // (n * rest), (budget - n * down) // (n * rest), "SoP's k")
        regroup = [at + 1 in ups for at in range(T)]
        return Plan(
            chains=n * k,
            lanes=1,
            quota=[[1] * T] * (n * k),
            left=[schedule.nfe] * n + [rest] * (n * k - n),
            accept=[False] * T,
            start=[c < n for c in range(n * k)],
            regroup=regroup,
            groups=n,
        )

    def module(self, plan: Plan, slots: int) -> Chains:
        return BestN(plan.groups, torch.tensor(plan.regroup, device="cpu"))
