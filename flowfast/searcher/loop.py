"""The search loop: branch -> velocity -> posterior mean -> decode -> reward -> decide, on the device, without a wait.

A *slot* holds one prompt, a slot has C *chains*, a chain proposes up to K *lanes* (candidate children of its parent)
a round. All of it is tensors
(searcher/state.py); the host knows only how many lanes a round can have at most, which follows from the budget, never
from the data. What a method
decides is its `Plan` and its module (searcher/methods). The class scripts with `torch.jit.script` when model and
reward do.
"""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

import flowfast.ops  # noqa: F401  (registers torch.ops.flowfast)
from flowfast.flow.schedule import Schedule
from flowfast.searcher.state import State, slice_of


class Search(nn.Module):
    """One batch of slots. `admit` a request, then `propose` and `observe` in turn while `running`, then `release`."""

    if TYPE_CHECKING:  # kept from torch.jit.script, which would take these for types of attributes
        flow: Any
        reward: Any
        method: Any
        state: State

    table: Tensor
    time: Tensor
    linear_time: Tensor
    accept: Tensor
    finished: Tensor
    row_index: Tensor
    lane_index: Tensor
    chain_index: Tensor
    side: Tensor
    x_lane: Tensor
    u_lane: Tensor
    x0_lane: Tensor
    plans: list[list[int]]
    rounds: list[int]
    shape: list[int]
    cond: dict[str, Tensor]
    null_cond: dict[str, Tensor]
    reward_cond: dict[str, Tensor]
    order: Tensor
    lane_slot: Tensor
    lane_row: Tensor
    lane_candidate: Tensor
    lane_live: Tensor
    kernel_row: Tensor
    live: Tensor
    images: Tensor
    dense: Tensor
    status: Tensor

    def __init__(
        self,
        flow: Any,
        reward: Any,
        method: nn.Module,
        schedule: Schedule,
        *,
        slots: int,
        chains: int,
        lanes: int,
        passes: int,
        micro_batch: int,
        accept: Tensor,
        margin: float,
        carry: bool,
        finished: Tensor,
        cond: dict[str, Tensor],
        reward_cond: dict[str, Tensor],
        top: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        """accept, finished (T,) bool: may the first child that beats the best reward by margin be taken here; is its
        x0_hat a
        finished sample. cond, reward_cond: one
        prompt's conditions (1, ...), as examples of shape and type."""
        super().__init__()
        device = device or torch.device("cpu")
        rows, numel = schedule.table.shape[0], 1
        self.shape = [int(size) for size in flow.shape]
        for size in self.shape:
            numel *= size
        self.flow, self.reward, self.method = flow, reward, method
        self.slots, self.chains, self.lanes, self.passes, self.micro_batch = slots, chains, lanes, passes, micro_batch
        self.rows, self.top, self.numel, self.margin, self.carry = rows, top, numel, margin, carry
        self.state = State(slots, chains, rows, numel, top, dtype, device)
        # One more row of the table starts from latents that the caller gave: x' = x at the first time.
        given = schedule.table[:1].clone()
        given[:, :4] = torch.tensor([1.0, 0.0, 0.0, 0.0])
        constant = {
            "table": torch.cat([schedule.table, given]).float(),
            "time": torch.cat([schedule.time, schedule.time[:1]]).float(),
            "linear_time": torch.cat([schedule.linear_time, schedule.linear_time[:1]]).float(),
            "accept": accept,
            "finished": finished,
            "row_index": torch.arange(rows),
            "lane_index": torch.arange(lanes),
            "chain_index": torch.arange(slots * chains),
            "side": torch.arange(2),
        }
        for name, tensor in constant.items():
            self.register_buffer(name, tensor.to(device), persistent=False)
        widest = -(-slots * chains * lanes // micro_batch) * micro_batch
        for name in ("x_lane", "u_lane", "x0_lane"):
            self.register_buffer(name, torch.zeros(widest, numel, dtype=dtype, device=device), persistent=False)
        none = torch.zeros(0, dtype=torch.int64, device=device)
        self.order, self.lane_slot, self.lane_row, self.lane_candidate, self.kernel_row = none, none, none, none, none
        self.lane_live, self.live, self.images, self.dense, self.status = none, none, none, none, none
        self.cond = {name: value.new_zeros([slots, *value.shape[1:]], device=device) for name, value in cond.items()}
        self.null_cond = {name: torch.zeros_like(value) for name, value in self.cond.items()}
        self.reward_cond = {
            name: value.new_zeros([slots, *value.shape[1:]], device=device) for name, value in reward_cond.items()
        }
        self.plans: list[list[int]] = [[0][:0] for _ in range(slots)]
        self.rounds: list[int] = [0 for _ in range(slots)]

    # ---- the batch is made of slots ----

    @torch.jit.export
    def admit(
        self,
        slot: int,
        cond: dict[str, Tensor],
        null_cond: dict[str, Tensor],
        reward_cond: dict[str, Tensor],
        key: int,
        quota: Tensor,
        left: Tensor,
        start: Tensor,
        plan: list[int],
        guidance: float,
        until: float,
        latents: Optional[Tensor],
    ) -> None:
        """Puts a request into a slot without touching its neighbours. plan[r]: lanes it has at most in its r-th
        round. latents (C, n) or None."""
        for name, value in cond.items():
            self.cond[name][slot] = value[0]
        for name, value in null_cond.items():
            self.null_cond[name][slot] = value[0]
        for name, value in reward_cond.items():
            self.reward_cond[name][slot] = value[0]
        if latents is not None:
            quota = quota.clone()
            quota[:, 0] = 1  # more candidates of a given start would be identical
        self.state.admit(slot, key, quota, left, start, guidance, until)
        self.method.reset(slot)
        if latents is not None:
            slice_of(self.state.x, slot, 2 * self.chains).copy_(latents.repeat_interleave(2, dim=0))
            self.state.given[slot] = True
        self.plans[slot] = plan
        self.rounds[slot] = 0

    @torch.jit.export
    def limit(self, slot: int, quota: Tensor, left: Tensor, plan: list[int]) -> None:
        """Cuts what the chains of a slot may still try and spend (Plan.forecast): quota (C, T), left (C,), 0 stops a
        chain. Those that go on keep enough to finish."""
        s = self.state
        own, stopped = slice_of(s.left, slot, self.chains), left <= 0
        need = torch.minimum(own, self.rows - slice_of(s.row, slot, self.chains))
        own.copy_(torch.where(stopped, 0, torch.maximum(torch.minimum(own, left), need)))
        slice_of(s.quota_table, slot, self.chains).copy_(quota)
        slice_of(s.stopped, slot, self.chains).logical_or_(stopped)
        slice_of(s.alive, slot, self.chains).logical_and_(torch.logical_not(stopped))
        self.plans[slot] = plan

    @torch.jit.export
    def release(self, slot: int) -> dict[str, Tensor]:
        """Takes a request out: its finished samples, best first, with their addresses, and what it cost. The slot is
        free then."""
        s, top = self.state, self.top
        slice_of(s.alive, slot, self.chains).fill_(False)
        self.plans[slot] = [0][:0]
        return {
            "reward": s.top_reward[slot].clone(),
            "x0": s.top_x0.narrow(0, slot * top, top).clone(),
            "x": s.top_x.narrow(0, slot * top, top).clone(),
            "row": s.top_row[slot].clone(),
            "chain": s.top_chain[slot].clone(),
            "candidate": s.top_candidate[slot].clone(),
            "cost": torch.stack([s.nfe[slot], s.nfe_speculative[slot], s.reward_calls[slot], s.nan_rewards[slot]]),
        }

    @torch.jit.export
    def width(self) -> int:
        """Lanes that the next round can have at most; 0: every slot is done."""
        lanes = 0
        for slot in range(self.slots):
            if self.rounds[slot] < len(self.plans[slot]):
                lanes += self.plans[slot][self.rounds[slot]]
        return lanes

    @torch.jit.export
    def search(self) -> None:
        """Runs every admitted request to its end."""
        while self.width() > 0:
            self.observe(self.score(self.propose()))

    # ---- one round ----

    @torch.jit.export
    def propose(self) -> Tensor:
        """Branches every live chain and evaluates its children: images (N, 3, H, W) of their posterior means, N a
        multiple of the micro-batch."""
        self.branch()
        self.evaluate()
        return self.decode()

    @torch.jit.export
    def branch(self) -> None:
        """Children of the parents, one fused gather + step + noise; live lanes come first."""
        s, K, M = self.state, self.lanes, self.micro_batch
        width = self.width()
        padded = (width + M - 1) // M * M
        available = s.left - (self.rows - 1 - s.row)  # every later transition keeps one evaluation back
        torch.minimum(s.quota, available, out=s.quota)
        self.live = self.lane_index.unsqueeze(0) < (s.quota * s.alive).unsqueeze(1)
        dead = torch.logical_not(self.live).flatten()
        order = torch.sort(dead.to(torch.uint8), dim=0, descending=False, stable=True)[1]
        if padded > order.size(0):
            order = torch.cat([order, order.new_zeros([padded - order.size(0)])])
        self.order = order[:padded]
        chain = torch.div(self.order, K, rounding_mode="floor")
        self.lane_slot = torch.div(chain, self.chains, rounding_mode="floor")
        self.lane_live = self.live.flatten().index_select(0, self.order)
        if padded > width:
            self.lane_live[width:].fill_(False)  # assigning False would copy it from the host when scripted
        self.lane_row = s.row.index_select(0, chain).clamp(max=self.rows - 1)
        self.lane_candidate = s.tried.index_select(0, chain) + self.order % K
        first = torch.logical_and(self.lane_row == 0, s.given.index_select(0, self.lane_slot))
        self.kernel_row = torch.where(self.lane_live, torch.where(first, self.rows, self.lane_row), -1)
        parent = torch.where(self.lane_live, 2 * chain + s.active.index_select(0, chain), -1)
        torch.ops.flowfast.branch_step(
            s.x,
            s.u,
            parent,
            self.kernel_row,
            s.key.index_select(0, self.lane_slot),
            self.lane_candidate,
            chain % self.chains,
            self.table,
            self.x_lane[:padded],
            None,
            None,
        )

    @torch.jit.export
    def evaluate(self) -> None:
        """Velocity and posterior mean of every child, in micro-batches of one padded size M, each row at its own
        time."""
        s, M = self.state, self.micro_batch
        shape = [M] + self.shape
        for i in range(0, self.order.size(0), M):
            slot, row = self.lane_slot[i : i + M], self.kernel_row[i : i + M]
            x, t = self.x_lane[i : i + M], self.time.index_select(0, self.lane_row[i : i + M])
            u = self.flow.velocity(x.view(shape), t, take(self.cond, slot)).reshape(M, self.numel)
            null, guidance = torch.jit.annotate(Optional[Tensor], None), torch.jit.annotate(Optional[Tensor], None)
            if self.passes == 2:
                null = self.flow.velocity(x.view(shape), t, take(self.null_cond, slot)).reshape(M, self.numel)
                guidance = s.guidance.index_select(0, slot)
            torch.ops.flowfast.posterior_mean(
                x, u, null, guidance, row, self.table, self.u_lane[i : i + M], self.x0_lane[i : i + M]
            )

    @torch.jit.export
    def decode(self) -> Tensor:
        M = self.micro_batch
        parts = [
            self.flow.decode(self.x0_lane[i : i + M].view([M] + self.shape)) for i in range(0, self.order.size(0), M)
        ]
        self.images = torch.cat(parts) if len(parts) > 1 else parts[0]
        return self.images

    @torch.jit.export
    def score(self, images: Tensor) -> Tensor:
        """Rewards (N,) of the images of this round by the device-side reward."""
        M = self.micro_batch
        t = self.linear_time.index_select(0, self.lane_row)
        parts = [
            self.reward(images[i : i + M], t[i : i + M], take(self.reward_cond, self.lane_slot[i : i + M]))
            for i in range(0, images.size(0), M)
        ]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.jit.export
    def observe(self, rewards: Tensor) -> None:
        """Rewards (N,) of this round decide: accept, keep the best child, roll quota over, take the step, regroup the
        chains."""
        s, B, K, C = self.state, self.slots * self.chains, self.lanes, self.chains
        rewards = rewards.to(torch.float32)
        # A reward may not see that the model broke (one that looks at 8-bit pictures): the posterior mean counts too.
        sound = torch.isfinite(self.x0_lane[: rewards.size(0)].sum(1, dtype=torch.float32))
        nan = torch.logical_and(torch.logical_or(torch.isnan(rewards), torch.logical_not(sound)), self.lane_live)
        rewards = torch.where(
            torch.logical_and(self.lane_live, torch.logical_not(nan)), rewards, -torch.inf
        )  # a NaN never wins
        cell = torch.where(self.lane_live, self.order, B * K)  # padding goes to a cell that nobody reads
        dense = rewards.new_full([B * K + 1], -torch.inf).scatter(0, cell, rewards)[: B * K].view(B, K)
        position = (
            self.order.new_zeros([B * K + 1])
            .scatter(0, cell, torch.arange(cell.size(0), device=cell.device))[: B * K]
            .view(B, K)
        )

        row = s.row.clamp(max=self.rows - 1)
        threshold = torch.where(self.accept.index_select(0, row), s.threshold + self.margin, torch.inf)
        next_row = (s.row + 1).clamp(max=self.rows - 1)
        next_quota = s.quota_table.gather(1, next_row.unsqueeze(1)).squeeze(1)
        winner, advance, used = torch.zeros_like(row), torch.zeros_like(row), torch.zeros_like(row)
        scores = self.method.scores(dense, s.key.repeat_interleave(C), row, self.chain_index % C, s.tried)
        torch.ops.flowfast.rollover(
            scores, self.live, next_quota, self.carry, s.quota, threshold, s.best_child, winner, advance, used
        )

        counted = torch.logical_and(self.live, self.lane_index.unsqueeze(0) < used.unsqueeze(1))
        won = winner >= 0
        lane = winner.clamp(min=0).unsqueeze(1)
        s.child.copy_(torch.where(won, s.tried + winner, s.child))
        s.child_reward.copy_(torch.where(won, dense.gather(1, lane).squeeze(1), s.child_reward))
        source = torch.where(won.unsqueeze(1), position.gather(1, lane), -1)
        source = torch.where(self.side.unsqueeze(0) != s.active.unsqueeze(1), source, -1)
        torch.ops.flowfast.promote_(s.x, s.u, self.x_lane, self.u_lane, source.flatten())
        self.keep_finished(torch.where(counted, dense, -torch.inf), position)

        stepped = torch.logical_and(advance >= 1, advance <= 2)
        here = torch.logical_and(self.row_index.unsqueeze(0) == s.row.unsqueeze(1), stepped.unsqueeze(1))
        s.path_chain.copy_(torch.where(here, (self.chain_index % C).unsqueeze(1), s.path_chain))
        s.path_candidate.copy_(torch.where(here, s.child.unsqueeze(1), s.path_candidate))
        s.reward.copy_(torch.where(stepped, s.child_reward, s.reward))
        torch.maximum(s.threshold, torch.where(stepped, s.child_reward, -torch.inf), out=s.threshold)
        s.child_reward.masked_fill_(stepped, -torch.inf)
        s.active.copy_(torch.where(stepped, 1 - s.active, s.active))
        live = self.live.sum(1)
        s.left.sub_(live)
        s.tried.copy_(torch.where(stepped, 0, s.tried + used))
        s.row.add_(stepped)
        s.alive.logical_and_(torch.logical_and(advance != 3, s.row < self.rows))
        self.regroup(stepped)

        s.nfe.add_(live.view(-1, C).sum(1) * self.passes)
        s.nfe_speculative.add_((live - used).view(-1, C).sum(1) * self.passes)
        s.reward_calls.add_(live.view(-1, C).sum(1))
        s.nan_rewards.index_add_(0, self.lane_slot, nan.to(torch.int64))
        s.alive.logical_and_((s.top_reward[:, 0] < s.until).repeat_interleave(C))
        self.dense = dense
        behind = torch.logical_and(self.live, torch.logical_not(counted)).to(torch.int64) * 3
        best = (self.lane_index.unsqueeze(0) == winner.unsqueeze(1)).to(torch.int64) * (
            1 + (advance == 1).to(torch.int64)
        ).unsqueeze(1)
        self.status = behind + best
        for slot in range(self.slots):
            self.rounds[slot] += 1

    # ---- parts of a round ----

    def keep_finished(self, rewards: Tensor, position: Tensor) -> None:
        """Merges the finished samples of this round, rewards (B, K), into the best `top` of their slots."""
        s, S, top, C, K = self.state, self.slots, self.top, self.chains, self.lanes
        at_end = self.finished.index_select(0, s.row.clamp(max=self.rows - 1))
        fresh = torch.where(at_end.unsqueeze(1), rewards, -torch.inf).view(S, C * K)
        merged, index = torch.sort(torch.cat([s.top_reward, fresh], 1), dim=1, descending=True, stable=True)
        merged, index = merged[:, :top], index[:, :top]
        new = torch.logical_and(index >= top, merged > -torch.inf)
        old = index.clamp(max=top - 1)
        cell = (index - top).clamp(min=0)  # (S, top) lane of the slot, counted chain by chain
        slot = torch.arange(S, device=old.device).unsqueeze(1)
        if top > 1:  # the old ones may change places
            moved = (old + slot * top).flatten()
            s.top_x0.copy_(s.top_x0.index_select(0, moved))
            s.top_x.copy_(s.top_x.index_select(0, moved))
        lane = torch.where(new, position.view(S, C * K).gather(1, cell), -1)
        torch.ops.flowfast.promote_(s.top_x0, s.top_x, self.x0_lane, self.x_lane, lane.flatten())
        local = torch.div(cell, K, rounding_mode="floor")
        chain = (local + slot * C).flatten()
        here = self.row_index.unsqueeze(0) == s.row.index_select(0, chain).unsqueeze(1)
        candidate = s.tried.index_select(0, chain) + (cell % K).flatten()
        path_chain = torch.where(here, local.flatten().unsqueeze(1), s.path_chain.index_select(0, chain)).view(
            S, top, -1
        )
        path_candidate = torch.where(here, candidate.unsqueeze(1), s.path_candidate.index_select(0, chain)).view(
            S, top, -1
        )
        wide = old.unsqueeze(2).expand_as(s.top_chain)
        s.top_chain.copy_(torch.where(new.unsqueeze(2), path_chain, s.top_chain.gather(1, wide)))
        s.top_candidate.copy_(torch.where(new.unsqueeze(2), path_candidate, s.top_candidate.gather(1, wide)))
        s.top_row.copy_(torch.where(new, s.row.index_select(0, chain).view(S, top), s.top_row.gather(1, old)))
        s.top_reward.copy_(merged)

    def regroup(self, stepped: Tensor) -> None:
        """Lets the method say which chain each chain goes on from; survivors keep their place, only the others are
        written."""
        if self.method.regroups:
            s, S, C = self.state, self.slots, self.chains
            moved = stepped.view(S, C).any(1)
            row = (s.row * stepped).view(S, C).amax(
                1
            ) - 1  # the transition that was just taken; chains of such a method go in step
            alive = torch.logical_or(s.alive, torch.logical_and(stepped, s.row >= self.rows)).view(S, C)
            reward = torch.where(alive, s.reward.view(S, C), -torch.inf)
            ancestors = self.method.regroup(reward, row.clamp(min=0), moved, s.key)
            chain = (ancestors + torch.arange(S, device=row.device).unsqueeze(1) * C).flatten()
            rows = torch.where(
                self.side.unsqueeze(0) == s.active.unsqueeze(1),
                (2 * chain + s.active.index_select(0, chain)).unsqueeze(1),
                -1,
            )
            rows = torch.where(rows >= 0, rows, 2 * self.chain_index.unsqueeze(1) + self.side.unsqueeze(0))
            torch.ops.flowfast.gather_ancestors_(s.x, s.u, rows.flatten())
            for tensor in (
                s.row,
                s.quota,
                s.left,
                s.tried,
                s.alive,
                s.threshold,
                s.reward,
                s.path_chain,
                s.path_candidate,
            ):
                tensor.copy_(tensor.index_select(0, chain))
            s.alive.logical_and_(torch.logical_not(s.stopped))


def take(cond: dict[str, Tensor], index: Tensor) -> dict[str, Tensor]:
    """Conditions of the lanes whose slots are index (N,)."""
    rows: dict[str, Tensor] = {}
    for name, value in cond.items():
        rows[name] = value.index_select(0, index)
    return rows
