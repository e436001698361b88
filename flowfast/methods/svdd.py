"""SVDD: the best (or a softmax draw) of K children at every transition (Li et al. 2024, arXiv 2408.08252, Algorithm
1)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule
from flowfast.methods.base import Chains, Method, Positive, Weights, register
from flowfast.methods.plan import Plan, cost, count_of, need, split, spread


def chain_quotas(schedule: Schedule, budget: int, chains: int, weights: list[float], first: int = 1) -> list[list[int]]:
    """Candidates (chains, transitions): one at every transition, `first` initial noises, the rest in proportion to
    weights over the transitions that add noise. budget: NFE."""
    T, passes = schedule.transitions, schedule.passes.tolist()
    noisy = schedule.searchable.tolist()
    if len(weights) not in (0, T):
        raise OptionError(f"expected {T} weights, one a transition, got {len(weights)}")
    shares = [(weights[k] if weights else 1.0) * (k > 0 and noisy[k]) for k in range(T)]
    quotas = []
    for spend in split(budget, chains, schedule.unit):
        extra = spread(spend - schedule.nfe - (first - 1) * passes[0], shares, passes)
        quotas.append([(first if k == 0 else 1) + extra[k] for k in range(T)])
    return quotas


class SoftmaxChoice(Chains):
    """argmax of r / temperature + Gumbel noise is a draw from softmax(r / temperature); the noise is addressed like
    all other."""

    def __init__(self, temperature: float):
        super().__init__(draws=True, temperature=temperature)

    @torch.jit.export
    def bias(self, key: Tensor, transition: Tensor, candidate: Tensor, chain: Tensor) -> Tensor:
        uniform = torch.empty([key.size(0), 1], dtype=torch.float32, device=key.device)
        torch.ops.flowfast.uniform_(uniform, key, transition, candidate, chain, 4)
        return -torch.log(-torch.log(uniform.squeeze(1)))


@register
@dataclass(frozen=True, kw_only=True)
class SVDD(Method):
    """SVDD: N chains, best or softmax draw of K children every step (arXiv 2408.08252). Target (softmax, exact
    value): p(x0) exp(r / temperature).

    Rule: each of N = 2 chains gets half of the budget; one evaluation for its initial noise and one a transition are
    set aside, the rest is spread over the transitions that add noise, evenly or by `weights`. At 500 NFE and 10 steps
    of one pass: K about 25.
    """

    name: ClassVar[str] = "svdd"

    choice: str = "argmax"
    temperature: Positive = 0.1
    weights: Weights = ()

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        self.check(schedule)
        T = schedule.transitions
        need(self.name, budget, schedule.nfe)
        n = count_of(chains, 2, budget // schedule.nfe, "SVDD's chains")
        quota = chain_quotas(schedule, budget, n, list(self.weights))
        width = max(max(q) for q in quota)
        return Plan(
            chains=n,
            lanes=min(lanes or width, width),
            quota=quota,
            left=[cost(q, schedule.passes.tolist()) for q in quota],
            accept=[False] * T,
        )

    def module(self, plan: Plan, slots: int) -> Chains:
        if self.choice not in ("argmax", "softmax"):
            raise OptionError(f"SVDD's choice must be 'argmax' or 'softmax', got {self.choice!r}")
        return Chains() if self.choice == "argmax" else SoftmaxChoice(self.temperature)
