"""The search loop: branch -> velocity -> posterior mean -> decode -> reward -> decide, on the device, without a wait.

A *slot* holds one prompt, a slot has C *chains*, a chain proposes up to K *lanes* (candidate children of its parent)
a round. All of it is tensors (state.py, lanes.py); the host knows only how many lanes a round can have at most, which
follows from the budget, never from the data. What a method decides is its `Plan` and its module (flowfast/methods).
The class scripts with `torch.jit.script` when model and reward do.
"""

from typing import TYPE_CHECKING, Any, NamedTuple, Optional

import torch
from torch import Tensor, nn

from flowfast.rounds.lanes import Lanes, learn
from flowfast.rounds.state import slice_of

DECIDE = torch.ops.flowfast.decide  # looked up once, as in lanes.py


class Limits(NamedTuple):
    """What the chains of a request may try and spend, and what the host knows of its rounds."""

    quota: Tensor
    """(C, T) int64: candidates at each transition."""
    left: Tensor
    """(C,) int64: NFE in all."""
    start: Tensor
    """(C,) bool: which chains run from the beginning."""
    widths: list[int]
    """Lanes of each round, at most."""
    scored: list[int]
    """Those of them whose score is read."""
    null: list[int]
    """Those of them that need the null condition, at most."""


class SlotBatch(Lanes):
    """One batch of slots. `admit` a request, then `round` while `width()` is above 0, then `release`."""

    if TYPE_CHECKING:  # kept from torch.jit.script, which would take these for types of attributes
        method: Any

    chain_index: Tensor
    side: Tensor
    # These may be empty, and then torch.jit.script knows their types from the class itself only.
    cond: dict[str, Tensor]
    null_cond: dict[str, Tensor]
    reward_cond: dict[str, Tensor]
    plans: list[list[int]]
    scored_plans: list[list[int]]
    null_plans: list[list[int]]
    rounds: list[int]

    def __init__(self, flow: Any, reward: Any, method: nn.Module, *lanes: Any, **sizes: Any):
        """method: the part of a method that runs in rounds (`flowfast.methods.base.Chains`); the rest as `Lanes`."""
        super().__init__(flow, reward, *lanes, **sizes)
        self.method = method
        self.chain_index = torch.arange(self.slots * self.chains, device=self.table.device)
        self.side = torch.arange(2, device=self.table.device)
        self.assigned = False  # have the lanes of the next round been laid?
        self.next_width, self.next_scored, self.next_null = -1, 0, 0  # what `turn` counted of it; -1: nothing
        self.ahead = True  # `decide` lays the next lanes, too; not in a CUDA graph, which would replay their number
        self.plans: list[list[int]] = [[0][:0] for _ in range(self.slots)]
        self.scored_plans: list[list[int]] = [[0][:0] for _ in range(self.slots)]
        self.null_plans: list[list[int]] = [[0][:0] for _ in range(self.slots)]
        self.rounds: list[int] = [0 for _ in range(self.slots)]

    # ---- the batch is made of slots ----

    @torch.jit.export
    def admit(
        self,
        slot: int,
        cond: dict[str, Tensor],
        null_cond: dict[str, Tensor],
        reward_cond: dict[str, Tensor],
        key: int,
        limits: Limits,
        guidance: float,
        until: float,
        latents: Optional[Tensor],
        first_chain: int = 0,
    ) -> None:
        """Puts a request into a slot without touching its neighbours. latents (C, n) or None. first_chain: the number
        of its first chain."""
        rows = self.micro_batch if self.slots == 1 else 1
        learn("prompt", self.cond, cond, slot, rows)
        if self.passes == 2:
            learn("null prompt", self.null_cond, null_cond, slot, rows)
        learn("reward", self.reward_cond, reward_cond, slot, rows)
        quota = limits.quota
        if latents is not None:
            quota = quota.clone()
            quota[:, 0] = 1  # more candidates of a given start would be identical
        self.state.admit(slot, key, quota, limits.left, limits.start, guidance, until, first_chain)
        self.method.reset(slot, quota)
        if latents is not None:
            slice_of(self.state.x, slot, 2 * self.chains).copy_(latents.repeat_interleave(2, dim=0))
            self.state.given[slot] = True
        self.rounds[slot] = 0
        self.expect(slot, limits.widths, limits.scored, limits.null)

    @torch.jit.export
    def limit(self, slot: int, limits: Limits) -> None:
        """Cuts what the chains of a slot may still try and spend (Plan.forecast): left 0 stops a chain. Those that go
        on keep enough to finish; `start` is not read."""
        s = self.state
        left = limits.left.to(s.left.device)
        own, stopped = slice_of(s.left, slot, self.chains), left <= 0
        to_end = self.to_end.index_select(0, slice_of(s.transition, slot, self.chains).clamp(max=self.transitions))
        need = torch.minimum(own, to_end)
        own.copy_(torch.where(stopped, 0, torch.maximum(torch.minimum(own, left), need)))
        slice_of(s.quota_table, slot, self.chains).copy_(limits.quota)
        slice_of(s.stopped, slot, self.chains).logical_or_(stopped)
        slice_of(s.alive, slot, self.chains).logical_and_(torch.logical_not(stopped))
        self.expect(slot, limits.widths, limits.scored, limits.null)

    @torch.jit.export
    def release(self, slot: int) -> dict[str, Tensor]:
        """Takes a request out: its finished samples, best first, with their addresses, and what it cost. The slot is
        free then."""
        s, top = self.state, self.top
        slice_of(s.alive, slot, self.chains).fill_(False)
        self.expect(slot, [0][:0], [0][:0], [0][:0])
        return {
            "reward": s.top_reward[slot].clone(),
            "x0": s.top_x0.narrow(0, slot * top, top).clone(),
            "x": s.top_x.narrow(0, slot * top, top).clone(),
            "transition": s.top_transition[slot].clone(),
            "chain": s.top_chain[slot].clone(),
            "candidate": s.top_candidate[slot].clone(),
            "cost": s.counters[:, slot].clone(),
        }

    @torch.jit.export
    def expect(self, slot: int, widths: list[int], scored: list[int], null: list[int]) -> None:
        """Lanes of a slot in each of its rounds, at most, those of them that are scored, and those that need the null
        condition; the next ones are laid anew."""
        self.plans[slot], self.scored_plans[slot], self.null_plans[slot] = widths, scored, null
        self.assigned, self.next_width = False, -1

    @torch.jit.export
    def width(self) -> int:
        """Lanes that the next round can have at most; 0: every slot is done."""
        return self.next_width if self.next_width >= 0 else next_lanes(self.plans, self.rounds)

    @torch.jit.export
    def scored_width(self) -> int:
        """Lanes of the next round, at most, whose score is read: the first ones."""
        return self.next_scored if self.next_width >= 0 else next_lanes(self.scored_plans, self.rounds)

    @torch.jit.export
    def null_width(self) -> int:
        """Lanes of the next round, at most, that need the null condition."""
        return self.next_null if self.next_width >= 0 else next_lanes(self.null_plans, self.rounds)

    @torch.jit.export
    def search(self) -> None:
        """Runs every admitted request to its end."""
        while self.width() > 0:
            self.round()

    # ---- one round ----

    @torch.jit.export
    def round(self) -> None:
        """Children, their posterior means, the images and rewards of those whose score is read, and what these
        decide."""
        self.observe(self.score(self.propose()))

    @torch.jit.export
    def propose(self) -> Tensor:
        """Branches every live chain and evaluates its children: images (N, 3, H, W) of the posterior means of the lanes
        whose score is read, N a multiple of the micro-batch, 0 where there is none."""
        self.lay()
        self.branch()
        self.evaluate()
        return self.decode()

    @torch.jit.export
    def lay(self) -> None:
        """How many lanes this round has at most, how many of them are scored and how many need the null condition, rows
        of padding included; lays them where the round before could not know them."""
        width, M = self.width(), self.micro_batch
        self.padded = (width + M - 1) // M * M
        self.scored_padded = (self.scored_width() + M - 1) // M * M
        self.null_padded = (self.null_width() + M - 1) // M * M
        if not self.assigned:
            self.assign(width)

    @torch.jit.export
    def observe(self, rewards: Tensor) -> None:
        """Rewards (N,) of the first lanes of this round decide: accept, keep the best child, roll quota over, take the
        step, regroup the chains."""
        self.turn()
        self.decide(rewards)

    @torch.jit.export
    def turn(self) -> None:
        """What the host counts of a round; `decide` then is work of the device alone and can be captured."""
        width, scored, null, rounds = 0, 0, 0, self.rounds
        for slot in range(self.slots):
            at = rounds[slot] + 1
            rounds[slot] = at
            plan = self.plans[slot]
            if at < len(plan):
                width += plan[at]
                scored += self.scored_plans[slot][at]
                null += self.null_plans[slot][at]
        self.assigned = self.ahead and not self.method.regroups  # these decide afterwards where chains go on
        self.next_width, self.next_scored, self.next_null = width if self.assigned else -1, scored, null

    @torch.jit.export
    def decide(self, rewards: Tensor) -> None:
        self.settle(rewards)
        if self.method.regroups:
            self.regroup(torch.logical_and(self.advance >= 1, self.advance <= 2))

    # ---- parts of a round ----

    def settle(self, rewards: Tensor) -> None:
        """All that is decided of each chain by itself."""
        s = self.state
        bias: Optional[Tensor] = None
        rewards = rewards.to(torch.float32).contiguous()
        if self.method.draws:
            n = rewards.size(0)
            bias = self.method.bias(
                self.lane_key[:n], self.lane_transition[:n], self.lane_candidate[:n], self.lane_chain[:n]
            )
        DECIDE(
            rewards,
            self.method.temperature,
            bias,
            self.ints,
            self.floats,
            self.flags,
            self.x_lane,
            self.u_lane,
            self.x0_lane,
            s.x,
            s.u,
            s.top_x,
            s.top_x0,
            self.slots,
            self.lanes,
            self.transitions,
            self.margin,
            self.carry,
            self.next_width,
        )

    def assign(self, width: int) -> None:
        torch.ops.flowfast.assign_lanes(
            self.ints, self.floats, self.flags, self.slots, self.chains, self.lanes, self.transitions, self.widest,
            self.top, width,
        )  # fmt: skip
        self.assigned = True

    def regroup(self, stepped: Tensor) -> None:
        """Lets the method say which chain each chain goes on from, or that it ends; survivors keep their place, only
        the others are written."""
        s, S, C = self.state, self.slots, self.chains
        # The transition that was just taken; chains of such a method go in step. Where no score is read, none is there.
        at = ((s.transition * stepped).view(S, C).amax(1) - 1).clamp(min=0)
        moved = torch.logical_and(stepped.view(S, C).any(1), self.scored.index_select(0, at))
        alive = torch.logical_or(s.alive, torch.logical_and(stepped, s.transition >= self.transitions)).view(S, C)
        reward = torch.where(alive, s.reward.view(S, C), -torch.inf)
        ancestors = self.method.regroup(reward, at, moved, s.key)
        shift = torch.arange(S, device=at.device).unsqueeze(1) * C
        chain = torch.where(ancestors < 0, self.chain_index.view(S, C), ancestors + shift).flatten()
        here = self.side.unsqueeze(0) == s.active.unsqueeze(1)  # of the two rows of each chain: the parent
        own = 2 * self.chain_index.unsqueeze(1) + self.side.unsqueeze(0)
        rows = torch.where(here, (2 * chain + s.active.index_select(0, chain)).unsqueeze(1), own)
        self.gather(rows.flatten())
        mine = (s.transition, s.quota, s.left, s.tried, s.alive, s.threshold, s.reward, s.path_chain, s.path_candidate)
        for tensor in mine:
            tensor.copy_(tensor.index_select(0, chain))
        s.alive.logical_and_(torch.logical_not(s.stopped)).logical_and_((ancestors >= 0).flatten())
        if self.method.ends:  # who moved to another place goes by the plan of that one
            now = s.transition.clamp(max=self.transitions - 1).unsqueeze(1)
            s.quota.copy_(s.quota_table.gather(1, now).squeeze(1))

    def gather(self, rows: Tensor) -> None:
        """rows (2 B,): the row of the store that each row goes on from."""
        torch.ops.flowfast.gather_ancestors_(self.state.x, self.state.u, rows)


def next_lanes(plans: list[list[int]], rounds: list[int]) -> int:
    """Lanes of all slots in their next rounds: of slot s it is number rounds[s], with plans[s][rounds[s]] lanes."""
    lanes = 0
    for plan, at in zip(plans, rounds):  # noqa: B905  (TorchScript knows no `strict`)
        if at < len(plan):
            lanes += plan[at]
    return lanes
