"""A batch of slots as the driver holds it: which prompts are in it, what is on its way to the host."""

from __future__ import annotations

import math
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor

from flowfast.engine.graphs import Graphs
from flowfast.engine.transfer import Transfer, Transfers
from flowfast.rounds.batch import SlotBatch


@dataclass(frozen=True)
class Report:
    """What is on its way to the host after a round, and what the host knew when the round was sent off."""

    transfer: Transfer
    index_of: dict[int, int]
    rounds: list[int]


@dataclass
class Group:
    """A batch of slots; index_of: the prompt of each slot that is taken."""

    engine: SlotBatch
    whole: Graphs
    forward: Graphs
    transfers: Transfers
    index_of: dict[int, int] = field(default_factory=dict)
    over: set[int] = field(default_factory=set)  # slots whose chains have all ended before their plan
    reports: deque[Report] = field(default_factory=deque)
    scored: Future[Tensor] | None = None  # the round that is under way waits for these rewards

    def __post_init__(self) -> None:
        e = self.engine
        conditions = (e.cond, e.null_cond, e.reward_cond)
        self.static = [e.x_lane, e.x0_lane, e.lane, e.lane_real, e.broken]
        self.static += [value for group in conditions for value in group.values()]
        self.seen = [torch.zeros_like(e.lane[:4]), torch.zeros_like(e.lane_live)]  # lanes of the round, for records
        host, pinned = (
            torch.full((e.lane_live.numel(),), -math.inf, dtype=torch.float32, device="cpu"),
            e.lane.device.type == "cuda",
        )
        self.scores = host.pin_memory() if pinned else host
        self.rewards = torch.empty_like(self.scores, device=e.lane.device)

    def rest(self, plans: list[list[int]]) -> list[int]:
        """Rows of the rounds to come by these plans, all slots together."""
        of_slots = [plans[slot][self.engine.rounds[slot] :] for slot in self.index_of]
        return [sum(column) for column in zip_longest(*of_slots, fillvalue=0)]

    def held(self) -> dict[str, Any]:
        """What the host knows of it between two rounds, for a checkpoint."""
        e, index_of = self.engine, {str(slot): index for slot, index in self.index_of.items()}
        lists = {"plans": e.plans, "scored": e.scored_plans, "rounds": e.rounds}
        return {**lists, "over": sorted(self.over), "index_of": index_of}

    def go_on(self, held: dict[str, Any]) -> None:
        """Goes back to what was held, once its prompts are admitted."""
        self.engine.rounds, self.over = held["rounds"], set(held["over"])
        for slot, (widths, scored) in enumerate(zip(held["plans"], held["scored"], strict=True)):
            self.engine.expect(slot, widths, scored)

    def is_done(self, slot: int) -> bool:
        return self.engine.rounds[slot] >= len(self.engine.plans[slot]) or slot in self.over
