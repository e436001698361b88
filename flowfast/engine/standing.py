"""How an engine stands, and how a request of it looks so far: for those who watch, without a change of any bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowfast.engine.request import Event, Partial, Progress
from flowfast.engine.runner import LiveRunner
from flowfast.errors import FlowfastError
from flowfast.ops.branch_step import D, E
from flowfast.ops.layout import ACTIVE
from flowfast.rounds.batch import SlotBatch
from flowfast.rounds.state import slice_of
from flowfast.surroundings import own_ground

if TYPE_CHECKING:
    from flowfast.engine.engine import Engine


@dataclass(frozen=True)
class Standing:
    """Counts of an engine since it was made."""

    running: int
    """Requests in slots."""
    waiting: int
    rows: int
    """That the model saw, padding included."""
    rows_used: int
    """NFE of requests in rounds that were reported, at most two fewer than have run."""
    rows_padded: int
    """Rows of those rounds that no request needed."""
    splits: int
    """Times that memory ran out and micro-batches became half as large."""
    nan_rewards: int
    reward_seconds: float
    """On CUDA up to a few thousand rounds late, for nothing waits for the device."""


def standing_of(engine: Engine) -> Standing:
    """From any thread: a round that is under way may be half in it."""
    core = engine.core
    running = sum(batch.live for batch in list(core.scheduler.batches))
    seconds = engine.loaded.clock.seconds["reward"]
    return Standing(
        running, core.scheduler.count, core.rows_seen, core.rows_used, core.rows_padded, core.halved, core.nan_rewards,
        seconds,
    )  # fmt: skip


@own_ground()
def best_so_far(engine: Engine, id: str) -> Tensor | None:
    """A picture (3, H, W) in [0, 1] on the CPU of a request that runs: its best finished sample, else the posterior
    mean at which the chain with the best reward stands. It takes one row through the (preview) decoder and waits for
    the device; no NFE and no score. None: the request waits, has ended, or its picture cannot be decoded now."""
    places = [(batch, slot) for batch, slot, job in engine.core.scheduler.running() if job.request.id == id]
    if not places or not isinstance(places[0][0].runner, LiveRunner):
        return None
    batch, slot = places[0][0].runner.engine, places[0][1]
    latent = latent_so_far(batch, slot)
    if latent is None:
        return None
    try:
        image: Tensor = engine.loaded.flow.decode(latent.view(1, *batch.shape))[0].float().cpu()
    except (FlowfastError, torch.OutOfMemoryError):
        return None
    return image.clone() if bool(image.isfinite().all()) else None


def latent_so_far(batch: SlotBatch, slot: int) -> Tensor | None:
    """The x0_hat (n,) of it. None: no round has been decided."""
    state = batch.state
    if float(state.top_reward[slot, 0]) > -math.inf:
        return state.top_x0[slot * batch.top].clone()
    transitions = slice_of(state.transition, slot, batch.chains).tolist()
    rewards = slice_of(state.reward, slot, batch.chains).tolist()
    begun = [chain for chain, transition in enumerate(transitions) if transition > 0]
    if not begun:
        return None
    leader = max(begun, key=lambda chain: rewards[chain])
    chain = slot * batch.chains + leader
    parent = 2 * chain + int(state.chain[ACTIVE, chain])
    row = batch.table[transitions[leader] - 1]
    return (row[D] * state.x[parent].float() + row[E] * state.u[parent].float()).to(state.x.dtype)


class Looks:
    """Hears the events of a request on the engine's thread, and adds a `Partial` after each of `count` equal parts of
    its budget but the last one: at the same rounds whatever else runs."""

    def __init__(self, engine: Engine, count: int, hear: Callable[[Event], None]):
        self.engine, self.count, self.hear, self.passed = engine, count, hear, 0

    def __call__(self, event: Event) -> None:
        self.hear(event)
        if isinstance(event, Progress) and self.due(event):
            image = best_so_far(self.engine, event.id)
            if image is not None:
                self.hear(Partial(event.id, image, event.nfe))

    def due(self, event: Progress) -> bool:
        passed = min(self.count, event.nfe * (self.count + 1) // max(event.budget, 1))
        later, self.passed = passed > self.passed, max(passed, self.passed)
        return later
