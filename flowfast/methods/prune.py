"""Pruned best-of-n: many scouts on the model's own path, cut where the verifier begins to see (successive halving:
Jamieson and Talwalkar 2016, arXiv 1502.07943)."""

from bisect import bisect_right
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor

from flowfast.bounds import Within
from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule
from flowfast.methods.base import ODE, Chains, Chosen, LinearTime, Method, register
from flowfast.methods.plan import Plan, cost, count_of, need

Share = Annotated[float, Within(0, 1, above=True)]


class BestLiveOn(Chains):
    """After a scored transition the chains with the best rewards go on in the first places, as many as the slot's plan
    has there (`reset`); the others end. Ties: the lower chain."""

    keep: Tensor

    def __init__(self, slots: int, transitions: int):
        super().__init__(regroups=True, ends=True)
        self.register_buffer("keep", torch.zeros(slots, transitions, dtype=torch.int64, device="cpu"), persistent=False)

    @torch.jit.export
    def reset(self, slot: int, quota: Tensor) -> None:
        self.keep[slot].copy_((quota > 0).sum(0))

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        S, C = rewards.size(0), rewards.size(1)
        place = torch.arange(C, device=rewards.device).expand(S, C)
        next_one = (transition + 1).clamp(max=self.keep.size(1) - 1)
        count = self.keep.gather(1, next_one.unsqueeze(1))
        ranked, best = torch.sort(rewards, dim=1, descending=True, stable=True)
        among = torch.logical_and(place < count, ranked > -torch.inf)  # in the order of rewards
        wins = torch.zeros_like(among).scatter(1, best, among)  # by place
        # Who wins in one of the first places stays there; the others move into those that became free, in order.
        free = torch.logical_and(place < count, torch.logical_not(wins))
        moves = torch.logical_and(place >= count, wins)
        movers = torch.sort(moves.to(torch.uint8), dim=1, descending=True, stable=True)[1]
        turn = torch.cumsum(free.to(torch.int64), 1) - 1
        mover = movers.gather(1, turn.clamp(min=0))
        filled = torch.logical_and(free, turn < moves.sum(1, keepdim=True))
        stays = torch.logical_and(place < count, wins)
        ancestors = torch.where(stays, place, torch.where(filled, mover, -1))
        return torch.where(moved.unsqueeze(1), ancestors, place)


def survivors(scouts: int, share: float) -> int:
    """How many go on after a cut; fewer than 3 are not cut."""
    return max(1, round(share * scouts)) if scouts >= 3 else scouts


@register
@dataclass(frozen=True, kw_only=True)
class Prune(Method):
    """Pruned best-of-n: n scouts, of which a share goes on after each cut, the best final reward wins (successive
    halving, arXiv 1502.07943). Target: the model's own distribution, maximum of n.

    Rule: cuts after the first transitions at or below the linear times `at`, to the shares `keep` of the scouts; two
    cuts that fall together are the last one of them. n is the most that the budget allows; below 3 scouts it is
    best-of-n. A reward is asked for at cuts and at the end, nowhere else.
    """

    name: ClassVar[str] = "prune"
    branches: ClassVar[bool] = False
    path: ClassVar[dict[str, Any]] = ODE
    wave: ClassVar[int | None] = 4

    at: tuple[LinearTime, ...] = (0.7, 0.55)
    keep: tuple[Share, ...] = (0.4, 0.15)
    n: Chosen = None

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        T, each, passes = schedule.transitions, schedule.nfe, schedule.passes.tolist()
        need(self.name, budget, each)
        cuts = self.cuts(schedule.linear_time.tolist())

        def alive(n: int) -> list[int]:
            """Chains at each transition."""
            counts = [n] * T
            for cut, share in cuts:
                counts[cut + 1 :] = [survivors(n, share)] * (T - cut - 1)
            return counts

        # From 3 scouts on they cost the more the more there are; 2 without a cut may cost more than 3.
        pruned = bisect_right(range(3, budget + 1), budget, key=lambda n: cost(alive(n), passes))
        most = 2 + pruned if pruned else budget // each
        n = count_of(self.n or chains, most, most, "prune's n (chains)")
        counts = alive(n)
        cutting = {at for at, _ in cuts if n >= 3}  # of all budgets alike, so that they share a batch
        return Plan(
            chains=n,
            lanes=1,
            quota=[[int(c < counts[at]) for at in range(T)] for c in range(n)],
            left=[each] * n,
            accept=[False] * T,
            regroup=[at in cutting for at in range(T)],
            ends=True,
        )

    def cuts(self, times: list[float]) -> list[tuple[int, float]]:
        """(transition, share of the scouts that goes on after it), in order. Raises OptionError."""
        later = zip(self.keep, self.keep[1:], strict=False)
        falling = all(a > b for a, b in zip(self.at, self.at[1:], strict=False)) and all(a >= b for a, b in later)
        if not self.at or len(self.at) != len(self.keep) or not falling:
            raise OptionError(
                f"prune needs as many falling shares `keep` as falling times `at`, got {self.keep} and {self.at}"
            )
        found: dict[int, float] = {}
        for time, share in zip(self.at, self.keep, strict=True):
            below = [k for k, t in enumerate(times[:-1]) if t <= time + 1e-9]
            if below:
                found[below[0]] = share
        return sorted(found.items())

    def module(self, plan: Plan, slots: int) -> Chains:
        return BestLiveOn(slots, len(plan.accept))
