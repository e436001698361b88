"""The search loop: branch -> velocity -> posterior mean -> decode -> reward -> decide, on the device, without a wait.

A *slot* holds one prompt, a slot has C *chains*, a chain proposes up to K *lanes* (candidate children of its parent)
a round. All of it is tensors (state.py); the host knows only how many lanes a round can have at most, which
follows from the budget, never from the data. What a method decides is its `Plan` and its module (flowfast/methods).
The class scripts with `torch.jit.script` when model and reward do.
"""

from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

import flowfast.ops  # noqa: F401  (registers torch.ops.flowfast)
from flowfast.errors import ModelError
from flowfast.flow.schedule import Schedule
from flowfast.ops.layout import Sizes, make_buffers, views
from flowfast.rounds.state import State, slice_of

SEEN_FIELDS = (
    "time", "linear_time", "finished", "scored", "lane", "lane_real", "lane_live", "broken", "image_sum", "dense",
    "status", "advance", "store_source",
)  # fmt: skip
"""Fields of the packed buffers that are known here by name."""


class Search(nn.Module):
    """One batch of slots. `admit` a request, then `propose` and `observe` in turn while `running`, then `release`."""

    if TYPE_CHECKING:  # kept from torch.jit.script, which would take these for types of attributes
        flow: Any
        reward: Any
        method: Any
        state: State

    table: Tensor
    ints: Tensor
    floats: Tensor
    flags: Tensor
    time: Tensor
    linear_time: Tensor
    finished: Tensor
    scored: Tensor
    chain_index: Tensor
    side: Tensor
    lane: Tensor
    lane_real: Tensor
    lane_live: Tensor
    broken: Tensor
    image_sum: Tensor
    dense: Tensor
    status: Tensor
    advance: Tensor
    store_source: Tensor
    x_lane: Tensor
    u_lane: Tensor
    x0_lane: Tensor
    plans: list[list[int]]
    scored_plans: list[list[int]]
    rounds: list[int]
    shape: list[int]
    cond: dict[str, Tensor]
    null_cond: dict[str, Tensor]
    reward_cond: dict[str, Tensor]

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
        scored: Tensor,
        finished: Tensor,
        cond: dict[str, Tensor],
        null_cond: dict[str, Tensor],
        reward_cond: dict[str, Tensor],
        top: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
    ):
        """accept, scored, finished (T,) bool: may the first child that beats the best reward by margin be taken here;
        is a child's score read; is its x0_hat a finished sample. cond, null_cond, reward_cond: one prompt's conditions
        (1, ...), as examples of shape and type; those of the null prompt may have others ({} with one pass)."""
        super().__init__()
        device = device or torch.device("cpu")
        transitions, numel = schedule.table.shape[0], 1
        self.shape = [int(size) for size in flow.shape]
        for size in self.shape:
            numel *= size
        self.flow, self.reward, self.method = flow, reward, method
        self.slots, self.chains, self.lanes, self.passes, self.micro_batch = slots, chains, lanes, passes, micro_batch
        self.rows, self.top, self.numel, self.margin, self.carry = transitions, top, numel, margin, carry
        # One more row of the table starts from latents that the caller gave: x' = x at the first time.
        given = schedule.table[:1].clone()
        given[:, :4] = given.new_tensor([1.0, 0.0, 0.0, 0.0])
        self.table = torch.cat([schedule.table, given]).float().to(device)
        self.chain_index = torch.arange(slots * chains, device=device)
        self.side = torch.arange(2, device=device)
        M = micro_batch
        widest = -(-slots * chains * lanes // M) * M
        sizes = Sizes(slots, chains, lanes, transitions, widest, top)
        buffers = make_buffers(sizes, device)
        fields = views(buffers, sizes)
        self.ints, self.floats, self.flags = buffers["ints"], buffers["floats"], buffers["flags"]
        fields["time"].copy_(torch.cat([schedule.time, schedule.time[:1]]))
        fields["linear_time"].copy_(torch.cat([schedule.linear_time, schedule.linear_time[:1]]))
        fields["accept"].copy_(accept)
        fields["finished"].copy_(finished)
        fields["passes"].fill_(passes)
        fields["scored"].copy_(scored)
        for name in SEEN_FIELDS:
            setattr(self, name, fields[name])  # plain, as in State
        self.state = State(fields, sizes, numel, dtype, device)
        # Without guidance and in one micro-batch the model's own output is u_lane: nothing copies it.
        self.direct = passes == 1 and widest == M
        for name, rows in (("x_lane", widest), ("u_lane", 0 if self.direct else widest), ("x0_lane", widest)):
            setattr(self, name, torch.zeros([rows, numel], dtype=dtype, device=device))
        self.lane_slot, self.lane_transition, self.lane_candidate = self.lane[1], self.lane[2], self.lane[3]
        self.lane_chain, self.lane_key, self.kernel_row, self.parent = self.lane[4:].unbind(0)
        # Micro-batches are views made once: a round makes none.
        self.x_part, self.u_part, self.x0_part = (list(t.split(M)) for t in (self.x_lane, self.u_lane, self.x0_lane))
        self.x_shaped = [part.view([M, *self.shape]) for part in self.x_part]
        self.x0_shaped = [part.view([M, *self.shape]) for part in self.x0_part]
        self.slot_part, self.row_part = list(self.lane_slot.split(M)), list(self.kernel_row.split(M))
        self.broken_part, self.image_sum_part = list(self.broken.split(M)), list(self.image_sum.split(M))
        self.t_part, self.linear_t_part, self.guidance_part = (list(t.split(M)) for t in self.lane_real)
        self.padded, self.scored_padded, self.next_width, self.assigned = 0, 0, -1, False
        self.ahead = True  # `decide` lays the next lanes, too; not in a CUDA graph, which would replay their number
        # One slot: its conditions lie there once a row of a micro-batch, and no round gathers them.
        rows = M if slots == 1 else slots
        self.cond, self.null_cond, self.reward_cond = (
            {name: value.new_zeros([rows, *value.shape[1:]], device=device) for name, value in like.items()}
            for like in (cond, null_cond, reward_cond)
        )
        self.plans: list[list[int]] = [[0][:0] for _ in range(slots)]
        self.scored_plans: list[list[int]] = [[0][:0] for _ in range(slots)]
        self.rounds: list[int] = [0 for _ in range(slots)]

    def __setattr__(self, name: str, value: Any) -> None:
        # nn.Module looks through parameters and modules first, a third of a round's host time where attributes are
        # written, and keeps its modules apart, where reading one takes as long as reading twenty tensors.
        if isinstance(value, nn.Module):
            super().__setattr__(name, value)
            self.__dict__[name] = value
        elif name in self.__dict__:
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

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
        scored: list[int],
        guidance: float,
        until: float,
        latents: Optional[Tensor],
    ) -> None:
        """Puts a request into a slot without touching its neighbours. plan[r]: lanes it has at most in its r-th
        round; scored[r]: those of them whose score is read. latents (C, n) or None."""
        self.learn(slot, "prompt", self.cond, cond)
        if self.passes == 2:
            self.learn(slot, "null prompt", self.null_cond, null_cond)
        self.learn(slot, "reward", self.reward_cond, reward_cond)
        if latents is not None:
            quota = quota.clone()
            quota[:, 0] = 1  # more candidates of a given start would be identical
        self.state.admit(slot, key, quota, left, start, guidance, until)
        self.method.reset(slot)
        if latents is not None:
            slice_of(self.state.x, slot, 2 * self.chains).copy_(latents.repeat_interleave(2, dim=0))
            self.state.given[slot] = True
        self.plans[slot], self.scored_plans[slot] = plan, scored
        self.rounds[slot] = 0
        self.assigned = False

    def learn(self, slot: int, whose: str, buffers: dict[str, Tensor], given: dict[str, Tensor]) -> None:
        """Conditions (1, ...) of a slot; nothing is stretched to fit. Raises ModelError."""
        rows = self.micro_batch if self.slots == 1 else 1
        for name, buffer in buffers.items():
            if name not in given:
                raise ModelError("the conditions of the " + whose + " lack '" + name + "', which others have")
            value = given[name]
            if value.dim() != buffer.dim() or value.size(0) != 1 or list(value.shape[1:]) != list(buffer.shape[1:]):
                raise ModelError(
                    "condition '" + name + "' of the " + whose + " must have the shape "
                    + str([1] + list(buffer.shape[1:])) + " that the batch was made for, got " + str(list(value.shape))
                    + ": encode all prompts to one shape"
                )  # fmt: skip
            buffer.narrow(0, slot, rows).copy_(value)

    @torch.jit.export
    def limit(self, slot: int, quota: Tensor, left: Tensor, plan: list[int], scored: list[int]) -> None:
        """Cuts what the chains of a slot may still try and spend (Plan.forecast): quota (C, T), left (C,), 0 stops a
        chain. Those that go on keep enough to finish."""
        s = self.state
        own, stopped = slice_of(s.left, slot, self.chains), left <= 0
        need = torch.minimum(own, self.rows - slice_of(s.transition, slot, self.chains))
        own.copy_(torch.where(stopped, 0, torch.maximum(torch.minimum(own, left), need)))
        slice_of(s.quota_table, slot, self.chains).copy_(quota)
        slice_of(s.stopped, slot, self.chains).logical_or_(stopped)
        slice_of(s.alive, slot, self.chains).logical_and_(torch.logical_not(stopped))
        self.plans[slot], self.scored_plans[slot] = plan, scored
        self.assigned = False

    @torch.jit.export
    def release(self, slot: int) -> dict[str, Tensor]:
        """Takes a request out: its finished samples, best first, with their addresses, and what it cost. The slot is
        free then."""
        s, top = self.state, self.top
        slice_of(s.alive, slot, self.chains).fill_(False)
        self.plans[slot] = [0][:0]
        self.assigned = False
        return {
            "reward": s.top_reward[slot].clone(),
            "x0": s.top_x0.narrow(0, slot * top, top).clone(),
            "x": s.top_x.narrow(0, slot * top, top).clone(),
            "row": s.top_transition[slot].clone(),
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
    def scored_width(self) -> int:
        """Lanes of the next round, at most, whose score is read: the first ones."""
        lanes = 0
        for slot in range(self.slots):
            if self.rounds[slot] < len(self.scored_plans[slot]):
                lanes += self.scored_plans[slot][self.rounds[slot]]
        return lanes

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
        self.lay()
        self.branch()
        self.evaluate()
        self.observe(self.score(self.decode()))

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
        """How many lanes this round has at most, and how many of them are scored, rows of padding included; lays them
        where the round before could not know them."""
        width, M = self.width(), self.micro_batch
        self.padded = (width + M - 1) // M * M
        self.scored_padded = (self.scored_width() + M - 1) // M * M
        if not self.assigned:
            self.assign(width)

    @torch.jit.unused
    def size(self) -> tuple[int, int]:
        """Of the round that was laid: rows of its model calls, rows that are decoded and scored."""
        return self.padded, self.scored_padded

    @torch.jit.export
    def branch(self) -> None:
        """Children of the parents, one fused gather + step + noise; live lanes come first."""
        self.step(None)

    def step(self, grad: Optional[Tensor]) -> None:
        """grad (N, n): gradients of the lanes' parents, where they are steered (steered.py)."""
        s = self.state
        torch.ops.flowfast.branch_step(
            s.x,
            s.u,
            self.parent,
            self.kernel_row,
            self.lane_key,
            self.lane_candidate,
            self.lane_chain,
            self.table,
            self.x_lane,
            None,
            grad,
        )

    @torch.jit.export
    def evaluate(self) -> None:
        """Velocity and posterior mean of every child, in micro-batches of one padded size M, each row at its own
        time."""
        for i in range(self.padded // self.micro_batch):
            x, t, slot = self.x_shaped[i], self.t_part[i], self.slot_part[i]
            u = self.flow.velocity(x, t, self.take(self.cond, slot))
            null = torch.jit.annotate(Optional[Tensor], None)
            if self.passes == 2:
                null = self.flow.velocity(x, t, self.take(self.null_cond, slot))
            self.mean(i, u, null)

    @torch.jit.export
    def mean(self, i: int, u: Tensor, null: Optional[Tensor]) -> None:
        """Posterior mean of micro-batch i, from its velocity u (M, *shape) and, with guidance, that of the null
        condition."""
        u, guidance = self.flat(u), torch.jit.annotate(Optional[Tensor], None)
        if null is not None:
            null, guidance = self.flat(null), self.guidance_part[i]
        u_out = None if self.direct else self.u_part[i]
        torch.ops.flowfast.posterior_mean(
            self.x_part[i], u, null, guidance, self.row_part[i], self.table, u_out, self.x0_part[i],
            self.broken_part[i],
        )  # fmt: skip
        if self.direct:
            self.u_lane = u

    def flat(self, u: Tensor) -> Tensor:
        """A velocity as (M, n) of the state's own type. Raises ModelError where it has another number of elements."""
        if u.size(0) != self.micro_batch or u.numel() != self.micro_batch * self.numel:
            raise ModelError(
                "velocity must return the shape of x_t, " + str([self.micro_batch] + self.shape) + ", got "
                + str(list(u.shape)) + ": mend the model"
            )  # fmt: skip
        return u.reshape(self.micro_batch, self.numel).to(self.x_lane.dtype).contiguous()

    @torch.jit.export
    def decode(self) -> Tensor:
        """Images of the lanes whose score is read, which come first."""
        parts: list[Tensor] = []
        for i in range(self.scored_padded // self.micro_batch):
            parts.append(self.flow.decode(self.x0_shaped[i]))
            self.look(i, parts[i])
        if len(parts) == 0:
            return self.x0_lane.new_zeros([0, 3, 0, 0])
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.jit.export
    def look(self, i: int, images: Tensor) -> None:
        """Notes whether the images (M, ...) of micro-batch i are finite: their sums say so in one launch. Raises
        ModelError where there are not M of them."""
        if images.dim() < 2 or images.size(0) != self.micro_batch:
            raise ModelError(
                "decode must return one image a latent, " + str(self.micro_batch) + " here, got the shape "
                + str(list(images.shape)) + ": mend the decoder"
            )  # fmt: skip
        torch.sum(images.flatten(1), [1], dtype=torch.float32, out=self.image_sum_part[i])

    @torch.jit.export
    def score(self, images: Tensor) -> Tensor:
        """Rewards (N,) of the images of this round by the device-side reward."""
        M = self.micro_batch
        parts = [
            self.reward(
                images[i * M : i * M + M], self.linear_t_part[i], self.take(self.reward_cond, self.slot_part[i])
            )
            for i in range(images.size(0) // M)
        ]
        if len(parts) == 0:
            return self.image_sum[:0]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    @torch.jit.export
    def observe(self, rewards: Tensor) -> None:
        """Rewards (N,) of the first lanes of this round decide: accept, keep the best child, roll quota over, take the
        step, regroup the chains."""
        self.turn()
        self.decide(rewards)

    @torch.jit.export
    def turn(self) -> None:
        """What the host counts of a round; `decide` then is work of the device alone and can be captured."""
        for slot in range(self.slots):
            self.rounds[slot] += 1
        self.assigned = self.ahead and not self.method.regroups  # these decide afterwards where chains go on
        self.next_width = self.width() if self.assigned else -1

    @torch.jit.export
    def decide(self, rewards: Tensor) -> None:
        self.settle(rewards)
        if self.method.regroups:
            self.regroup(torch.logical_and(self.advance >= 1, self.advance <= 2))

    # ---- parts of a round ----

    def settle(self, rewards: Tensor) -> None:
        """All that is decided of each chain by itself."""
        s, bias = self.state, torch.jit.annotate(Optional[Tensor], None)
        rewards = rewards.to(torch.float32)
        if self.method.draws:
            n = rewards.size(0)
            bias = self.method.bias(
                self.lane_key[:n], self.lane_transition[:n], self.lane_candidate[:n], self.lane_chain[:n]
            )
        torch.ops.flowfast.decide(
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
            self.rows,
            self.margin,
            self.carry,
            self.next_width,
        )

    def take(self, cond: dict[str, Tensor], slot: Tensor) -> dict[str, Tensor]:
        """Conditions of the lanes of a micro-batch, whose slots are slot (M,)."""
        if self.slots == 1:
            return cond
        rows: dict[str, Tensor] = {}
        for name, value in cond.items():
            rows[name] = value.index_select(0, slot)
        return rows

    def assign(self, width: int) -> None:
        torch.ops.flowfast.assign_lanes(
            self.ints,
            self.floats,
            self.flags,
            self.slots,
            self.chains,
            self.lanes,
            self.rows,
            self.lane_live.size(0),
            self.top,
            width,
        )
        self.assigned = True

    def regroup(self, stepped: Tensor) -> None:
        """Lets the method say which chain each chain goes on from, or that it ends; survivors keep their place, only
        the others are written."""
        s, S, C = self.state, self.slots, self.chains
        # The transition that was just taken; chains of such a method go in step. Where no score is read, none is there.
        at = ((s.transition * stepped).view(S, C).amax(1) - 1).clamp(min=0)
        moved = torch.logical_and(stepped.view(S, C).any(1), self.scored.index_select(0, at))
        alive = torch.logical_or(s.alive, torch.logical_and(stepped, s.transition >= self.rows)).view(S, C)
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

    def gather(self, rows: Tensor) -> None:
        """rows (2 B,): the row of the store that each row goes on from."""
        torch.ops.flowfast.gather_ancestors_(self.state.x, self.state.u, rows)
