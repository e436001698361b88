"""CoDe: blockwise best of K (Singh et al. 2025, arXiv 2502.00968, Algorithm 1)."""

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowfast.bounds import Within
from flowfast.flow.grid import MOST_STEPS
from flowfast.flow.schedule import Schedule
from flowfast.methods.base import Chains, Chosen, Method, register
from flowfast.methods.plan import Plan, count_of, need


class BestOfGroup(Chains):
    """Chains stand in groups of `size`; after a block all of a group go on from its best."""

    def __init__(self, size: int, regroup: Tensor):
        super().__init__(regroups=True)
        self.size = size
        self.at: Tensor
        self.register_buffer("at", regroup, persistent=False)

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        S, C = rewards.size(0), rewards.size(1)
        index = torch.arange(C, device=rewards.device).expand(S, C)
        grouped = rewards.view(S, -1, self.size)
        best = grouped.argmax(2) + torch.arange(0, C, self.size, device=rewards.device)
        now = torch.logical_and(moved, self.at.index_select(0, transition))
        return torch.where(now.unsqueeze(1), best.repeat_interleave(self.size, dim=1), index)


@register
@dataclass(frozen=True, kw_only=True)
class CoDe(Method):
    """CoDe: N groups of K chains run freely for L steps, then go on from the best of their group (arXiv 2502.00968).
    Target: blockwise best of K.

    Rule: N x K = budget // NFE of one run, N = 2 where that leaves K >= 2 (else 1), L = 2. At 500 NFE and 10 steps of
    one pass: N = 2, K = 25.
    """

    name: ClassVar[str] = "code"

    block: Annotated[int, Within(1, MOST_STEPS)] = 2
    k: Chosen = None

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        self.check(schedule)
        T, each = schedule.transitions, schedule.nfe
        need(self.name, budget, 2 * each)
        most = budget // each
        n = count_of(chains, 2 if most >= 4 else 1, most, "CoDe's groups (chains)")
        k = count_of(self.k, most // n, most // n, "CoDe's k")
        noisy = schedule.searchable.tolist()  # copies that no noise tells apart any more would be identical
        regroup = [at > 0 and (at + 1) % self.block == 0 and any(noisy[at + 1 :]) for at in range(T)]
        return Plan(
            chains=n * k,
            lanes=1,
            quota=[[1] * T] * (n * k),
            left=[each] * (n * k),
            accept=[False] * T,
            regroup=regroup,
            groups=n,
            keep=sorted(range(n * k), key=lambda chain: (chain % k, chain)),
        )

    def module(self, plan: Plan, slots: int) -> Chains:
        return BestOfGroup(plan.chains // plan.groups, torch.tensor(plan.regroup, device="cpu"))
