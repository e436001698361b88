"""The lanes of a round: children of the chains' parents, their velocities and posterior means, the images and rewards
of those whose score is read. Micro-batches of one padded size; views of them are made once.

The class scripts with `torch.jit.script` when model and reward do.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Optional

import torch
from torch import Tensor, nn

import flowfast.ops  # noqa: F401  (registers torch.ops.flowfast)
from flowfast.errors import ModelError
from flowfast.flow.schedule import Schedule
from flowfast.ops.layout import (
    CANDIDATE,
    LANE_CHAIN,
    LANE_KEY,
    LANE_SLOT,
    LANE_TRANSITION,
    PARENT,
    TABLE_ROW,
    TIME,
    Sizes,
    make_buffers,
    views,
)
from flowfast.rounds.state import State

# A round's host time is counted in microseconds: looked up once.
BRANCH_STEP = torch.ops.flowfast.branch_step
POSTERIOR_MEAN = torch.ops.flowfast.posterior_mean
SEEN_FIELDS = (
    "time", "linear_time", "finished", "scored", "to_end", "lane", "lane_real", "lane_live", "null_lane", "broken",
    "image_sum", "dense", "status", "advance", "store_source",
)  # fmt: skip
"""Fields of the packed buffers that are known here by name."""


@dataclass(frozen=True)
class Rules:
    """What the decisions of a batch go by, the same in all of its slots."""

    passes: Tensor
    """(T,) int64: NFE of an evaluation."""
    accept: Tensor
    """(T,) bool: may the first child that beats the best reward by `margin` be taken at once?"""
    scored: Tensor
    """(T,) bool: is a child's score read?"""
    finished: Tensor
    """(T,) bool: is its x0_hat a finished sample?"""
    margin: float = 0.0
    carry: bool = False
    """Does an unused quota roll over to the next transition?"""


@dataclass(frozen=True)
class Examples:
    """One prompt's conditions (1, ...), as examples of shape and type; those of the null prompt may have others ({}
    with one pass)."""

    cond: dict[str, Tensor]
    null_cond: dict[str, Tensor]
    reward_cond: dict[str, Tensor]


class NullLanes(nn.Module):
    """Where guidance acts at some transitions only: the lanes that need the null condition, gathered."""

    if TYPE_CHECKING:
        x_lane: Tensor
        lane_time: Tensor
        lane_slot: Tensor
        null_u: Tensor
        null_part: list[Tensor]
        shape: list[int]
        micro_batch: int
        numel: int
        widest: int

    @torch.jit.export
    def null_inputs(self, i: int) -> tuple[Tensor, Tensor, Tensor]:
        """x (M, *shape), t (M,) and slot (M,) of micro-batch i of the lanes that need the null condition, where these
        are gathered; rows behind the last one are the first lane's."""
        lane = self.null_part[i].clamp(min=0)
        x = self.x_lane.index_select(0, lane).view([self.micro_batch] + self.shape)
        return x, self.lane_time.index_select(0, lane), self.lane_slot.index_select(0, lane)

    @torch.jit.export
    def keep_null(self, i: int, u: Tensor) -> None:
        """The velocities of `null_inputs(i)`; what is of no lane goes to the row behind the last."""
        lane = self.null_part[i]
        self.null_u.index_copy_(0, torch.where(lane < 0, self.widest, lane), self.flat(u))

    def flat(self, u: Tensor) -> Tensor:
        """A velocity as (M, n) of the state's own type. Raises ModelError where it has another number of elements."""
        if u.size(0) != self.micro_batch or u.numel() != self.micro_batch * self.numel:
            raise ModelError(
                "velocity must return the shape of x_t, " + str([self.micro_batch] + self.shape) + ", got "
                + str(list(u.shape)) + ": mend the model"
            )  # fmt: skip
        return u.reshape(self.micro_batch, self.numel).to(self.x_lane.dtype).contiguous()


class Lanes(NullLanes):
    """Buffers of a batch, and what the model and the reward say of its lanes."""

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
    to_end: Tensor
    lane: Tensor
    lane_real: Tensor
    lane_live: Tensor
    null_lane: Tensor
    null_u: Tensor
    broken: Tensor
    image_sum: Tensor
    dense: Tensor
    status: Tensor
    advance: Tensor
    store_source: Tensor
    x_lane: Tensor
    u_lane: Tensor
    x0_lane: Tensor
    shape: list[int]
    cond: dict[str, Tensor]
    null_cond: dict[str, Tensor]
    reward_cond: dict[str, Tensor]

    def __init__(
        self,
        flow: Any,
        reward: Any,
        schedule: Schedule,
        rules: Rules,
        examples: Examples,
        *,
        slots: int,
        chains: int,
        lanes: int,
        micro_batch: int,
        top: int = 1,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        captured: bool = False,
    ):
        """slots of so many chains, each with so many lanes a round; `top` finished samples are kept of a slot.
        captured: the model runs in a CUDA graph, whose memory the next one writes over."""
        super().__init__()
        device, M, passes = device or torch.device("cpu"), micro_batch, int(rules.passes.max())
        self.shape = [int(size) for size in flow.shape]
        self.flow, self.reward, self.numel = flow, reward, math.prod(self.shape)
        self.slots, self.chains, self.lanes, self.micro_batch, self.passes = slots, chains, lanes, M, passes
        # Do only some transitions need the null condition? Their lanes are then gathered into model calls of their own.
        self.partial = passes == 2 and int(rules.passes.min()) == 1
        self.transitions, self.top, self.margin, self.carry = schedule.transitions, top, rules.margin, rules.carry
        # One more row of the table starts from latents that the caller gave: x' = x at the first time.
        given = schedule.table[:1].clone()
        given[:, :4] = given.new_tensor([1.0, 0.0, 0.0, 0.0])
        self.table = torch.cat([schedule.table, given]).float().to(device)
        self.widest = -(-slots * chains * lanes // M) * M
        sizes = Sizes(slots, chains, lanes, self.transitions, self.widest, top)
        fields = self._lay_out(sizes, schedule, rules, device)
        self.state = State(fields, sizes, self.numel, dtype, device)
        # Without guidance and in one micro-batch the model's own output is u_lane: nothing copies it.
        self.direct = passes == 1 and self.widest == M and not captured
        self._make_lanes(dtype, device)
        self.padded, self.scored_padded, self.null_padded = 0, 0, 0
        self.image_dims, self.has_sums = [1, 2, 3], False  # of `look`: what it sums over, and whether it has
        # One slot: its conditions lie there once a row of a micro-batch, and no round gathers them.
        rows = M if slots == 1 else slots
        self.cond, self.null_cond, self.reward_cond = (
            {name: value.new_zeros([rows, *value.shape[1:]], device=device) for name, value in like.items()}
            for like in (examples.cond, examples.null_cond, examples.reward_cond)
        )

    @torch.jit.unused
    def _lay_out(self, sizes: Sizes, schedule: Schedule, rules: Rules, device: torch.device) -> dict[str, Tensor]:
        """The packed buffers (flowfast/ops/layout.py) with the constants of a batch; their fields."""
        buffers = make_buffers(sizes, device)
        self.ints, self.floats, self.flags = buffers["ints"], buffers["floats"], buffers["flags"]
        fields = views(buffers, sizes)
        fields["time"].copy_(torch.cat([schedule.time, schedule.time[:1]]))
        fields["linear_time"].copy_(torch.cat([schedule.linear_time, schedule.linear_time[:1]]))
        fields["passes"].copy_(rules.passes)
        to_end = rules.passes.flip(0).cumsum(0).flip(0)
        fields["to_end"].copy_(torch.cat([to_end, torch.zeros_like(to_end[:1])]))
        for name in ("accept", "scored", "finished"):
            fields[name].copy_(getattr(rules, name))
        for name in SEEN_FIELDS:
            setattr(self, name, fields[name])  # plain, as in State
        return fields

    @torch.jit.unused
    def _make_lanes(self, dtype: torch.dtype, device: torch.device) -> None:
        """Latents of the lanes, and views of micro-batches: a round makes none."""
        M, widest = self.micro_batch, self.widest
        for name, rows in (("x_lane", widest), ("u_lane", 0 if self.direct else widest), ("x0_lane", widest)):
            setattr(self, name, torch.zeros([rows, self.numel], dtype=dtype, device=device))
        self.lane_slot, self.lane_transition = self.lane[LANE_SLOT], self.lane[LANE_TRANSITION]
        self.lane_time = self.lane_real[TIME]
        self.lane_candidate, self.lane_chain = self.lane[CANDIDATE], self.lane[LANE_CHAIN]
        self.lane_key, self.table_row, self.parent = self.lane[LANE_KEY], self.lane[TABLE_ROW], self.lane[PARENT]
        self.x_part, self.u_part, self.x0_part = (list(t.split(M)) for t in (self.x_lane, self.u_lane, self.x0_lane))
        self.null_u = torch.zeros([widest + 1 if self.partial else 0, self.numel], dtype=dtype, device=device)
        self.null_part, self.null_u_part = list(self.null_lane.split(M)), list(self.null_u[:widest].split(M))
        self.x_shaped, self.x0_shaped = ([p.view([M, *self.shape]) for p in ps] for ps in (self.x_part, self.x0_part))
        self.slot_part, self.table_row_part = list(self.lane_slot.split(M)), list(self.table_row.split(M))
        self.broken_part, self.image_sum_part = list(self.broken.split(M)), list(self.image_sum.split(M))
        self.t_part, self.linear_t_part, self.guidance_part = (list(t.split(M)) for t in self.lane_real)

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

    @torch.jit.unused
    def size(self) -> tuple[int, int]:
        """Of the round that was laid: rows of its model calls, rows that are decoded and scored."""
        return self.padded + self.null_padded, self.scored_padded

    @torch.jit.export
    def branch(self) -> None:
        """Children of the parents, one fused gather + step + noise; live lanes come first."""
        self.step(None)

    def step(self, grad: Optional[Tensor]) -> None:
        """grad (N, n): gradients of the lanes' parents, where they are steered (steered.py)."""
        s = self.state
        BRANCH_STEP(
            s.x,
            s.u,
            self.parent,
            self.table_row,
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
        if self.partial:
            for i in range(self.null_padded // self.micro_batch):
                x, t, slot = self.null_inputs(i)
                self.keep_null(i, self.flow.velocity(x, t, self.take(self.null_cond, slot)))
        for i in range(self.padded // self.micro_batch):
            x, t, slot = self.x_shaped[i], self.t_part[i], self.slot_part[i]
            u = self.flow.velocity(x, t, self.take(self.cond, slot))
            null: Optional[Tensor] = None
            if self.passes == 2 and not self.partial:
                null = self.flow.velocity(x, t, self.take(self.null_cond, slot))
            self.mean(i, u, null)

    @torch.jit.export
    def mean(self, i: int, u: Tensor, null: Optional[Tensor]) -> None:
        """Posterior mean of micro-batch i, from its velocity u (M, *shape) and, with guidance, that of the null
        condition; where only some lanes need that, `keep_null` has it."""
        u = self.flat(u)
        guidance: Optional[Tensor] = None
        if self.partial:
            null, guidance = self.null_u_part[i], self.guidance_part[i]
        elif null is not None:
            null, guidance = self.flat(null), self.guidance_part[i]
        u_out = None if self.direct else self.u_part[i]
        POSTERIOR_MEAN(
            self.x_part[i], u, null, guidance, self.table_row_part[i], self.table, u_out, self.x0_part[i],
            self.broken_part[i],
        )  # fmt: skip
        if self.direct:
            self.u_lane = u

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
        """Notes whether the images (M, ...) of micro-batch i are finite: their sums say so in one launch. Where latents
        are the pictures the posterior mean has said it. Raises ModelError where there are not M of them."""
        if images is self.x0_shaped[i]:
            if self.has_sums:
                self.image_sum.zero_()
                self.has_sums = False
            return
        self.has_sums = True
        if images.dim() != len(self.image_dims) + 1:
            self.image_dims = list(range(1, images.dim()))
        if len(self.image_dims) == 0 or images.size(0) != self.micro_batch:
            raise ModelError(
                "decode must return one image a latent, " + str(self.micro_batch) + " here, got the shape "
                + str(list(images.shape)) + ": mend the decoder"
            )  # fmt: skip
        torch.sum(images, self.image_dims, dtype=torch.float32, out=self.image_sum_part[i])

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

    def take(self, cond: dict[str, Tensor], slot: Tensor) -> dict[str, Tensor]:
        """Conditions of the lanes of a micro-batch, whose slots are slot (M,)."""
        if self.slots == 1:
            return cond
        rows: dict[str, Tensor] = {}
        for name, value in cond.items():
            rows[name] = value.index_select(0, slot)
        return rows


def learn(whose: str, buffers: dict[str, Tensor], given: dict[str, Tensor], slot: int, rows: int) -> None:
    """Conditions (1, ...) of a slot, `rows` times; nothing is stretched to fit. Raises ModelError."""
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
