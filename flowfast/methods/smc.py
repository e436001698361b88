"""Sequential Monte Carlo: particles weighted by the reward, resampled when few of them carry the weight."""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from flowfast.bounds import Within
from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule
from flowfast.methods.base import Chains, Method, Positive, register
from flowfast.methods.plan import Plan, count_of, need
from flowfast.ops.resample import RESAMPLING


class Particles(Chains):
    """log w += potential_k - potential_{k-1}, kept until the slot resamples; potential_k = tempering_k r_k /
    temperature."""

    at: Tensor
    strength: Tensor
    log_weights: Tensor
    potential: Tensor
    log_z: Tensor

    def __init__(self, slots: int, chains: int, regroup: Tensor, strength: Tensor, scheme: int, ess_gate: float):
        super().__init__(regroups=True)
        self.scheme, self.gate = scheme, ess_gate * chains
        self.register_buffer("at", regroup, persistent=False)
        self.register_buffer("strength", strength, persistent=False)
        for name, shape in (("log_weights", (slots, chains)), ("potential", (slots, chains)), ("log_z", (slots,))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float32, device="cpu"), persistent=False)

    @torch.jit.export
    def reset(self, slot: int, quota: Tensor) -> None:
        self.log_weights[slot].zero_()
        self.potential[slot].zero_()
        self.log_z[slot].zero_()

    @torch.jit.export
    def log_normalizer(self) -> Tensor:
        """Estimate (S,) of log E[exp(potential of the end)] under the model's own path: unbiased on the natural
        scale."""
        return self.log_z + torch.logsumexp(self.log_weights, 1) - math.log(self.log_weights.size(1))

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        potential = self.strength.index_select(0, transition).unsqueeze(1) * rewards
        dead = torch.isinf(rewards)
        moving = torch.logical_and(moved.unsqueeze(1), torch.logical_not(dead))
        step = torch.where(moving, potential - self.potential, 0.0)
        self.log_weights.copy_(torch.where(dead, -torch.inf, self.log_weights + step))
        self.potential.copy_(torch.where(moving, potential, self.potential))
        weights = torch.empty_like(self.log_weights)
        ess, increment = torch.empty_like(self.log_z), torch.empty_like(self.log_z)
        torch.ops.flowfast.normalize_log_weights(self.log_weights, weights, ess, increment)
        few = torch.logical_and(ess <= self.gate, ess > 0)
        now = torch.logical_and(torch.logical_and(moved, self.at.index_select(0, transition)), few)
        ancestors = torch.zeros(weights.shape, dtype=torch.int64, device=weights.device)
        torch.ops.flowfast.resample(weights, key, transition, now, self.scheme, ancestors)
        self.potential.copy_(self.potential.gather(1, ancestors))
        self.log_z.add_(torch.where(now, increment, 0.0))
        self.log_weights.masked_fill_(now.unsqueeze(1), 0.0)
        return ancestors


@register
@dataclass(frozen=True, kw_only=True)
class SMC(Method):
    """SMC: N particles, weights exp(change of r / temperature), resampled at low ESS (Kim et al. 2025, arXiv
    2501.05803). Target: p(x0) exp(r / temperature).

    Rule: N = budget // NFE of one run. `tempering` raises the strength of the reward linearly from transition 0 to
    the last ("linear") or not at all ("none").
    """

    name: ClassVar[str] = "smc"

    temperature: Positive = 0.1
    resampling: str = "systematic"
    ess_gate: Annotated[float, Within(0, 1)] = 0.5
    tempering: str = "none"

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        self.check(schedule)
        T, each = schedule.transitions, schedule.nfe
        need(self.name, budget, 2 * each)
        n = count_of(chains, budget // each, budget // each, "SMC's particles (chains)")
        # Resampling pays only while noise follows that tells the copies apart.
        noisy = schedule.searchable.tolist()
        regroup = [any(noisy[at + 1 :]) for at in range(T)]
        return Plan(chains=n, lanes=1, quota=[[1] * T] * n, left=[each] * n, accept=[False] * T, regroup=regroup)

    def module(self, plan: Plan, slots: int) -> Chains:
        if self.resampling not in RESAMPLING:
            raise OptionError(f"unknown resampling {self.resampling!r}: choose one of {', '.join(RESAMPLING)}")
        if self.tempering not in ("none", "linear"):
            raise OptionError(f"tempering must be 'none' or 'linear', got {self.tempering!r}")
        T = len(plan.accept)
        strength = torch.linspace(1 / T if self.tempering == "linear" else 1, 1, T, dtype=torch.float32, device="cpu")
        at = torch.tensor(plan.regroup, device="cpu")
        return Particles(
            slots, plan.chains, at, strength / self.temperature, RESAMPLING[self.resampling], self.ess_gate
        )
