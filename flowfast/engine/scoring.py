"""Rewards of a round, and whose fault it is where one fails."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowfast import rewards
from flowfast.engine import spans
from flowfast.engine.transfer import Transfer
from flowfast.errors import FlowfastError
from flowfast.rounds.batch import SlotBatch

Failed = dict[int, FlowfastError]
"""By slot."""


@torch.no_grad()
def score_on_host(
    scorer: Any, transfer: Transfer, texts: list[str], out: Tensor, most_images: int | None, by_request: bool
) -> tuple[Tensor, Failed]:
    """Rewards (N,) of a round's images by a reward on the host, in `out`, and the slots for whose images it failed.

    The reward sees finite images of lanes whose score is read. texts: the prompt of each slot. by_request: in a call
    are the images of one request, so that no score depends on a neighbour, unless the reward says that it scores each
    image by itself (`independent`): then it is asked a request at a time only where it failed. Else a call has those of
    the whole round, and what it raises is raised.
    """
    images, on, slot, t, image_sum = transfer.read()
    live = on.logical_and(image_sum.isfinite()).nonzero().flatten()
    scores, failed = out[: len(on)].fill_(-math.inf), Failed()

    def ask(lanes: Tensor) -> None:
        with spans.REWARD:
            for part in lanes.split(most_images or max(1, len(lanes))):
                if len(part):
                    scores[part] = scorer(images[part], [texts[i] for i in slot[part].tolist()], t[part])

    if not by_request:
        ask(live)
        return scores, failed
    if getattr(scorer, "independent", False):
        try:
            ask(live)
            return scores, failed
        except FlowfastError:
            pass
    for each in sorted(set(slot[live].tolist())):
        try:
            ask(live[slot[live] == each])
        except FlowfastError as error:
            failed[each] = error
    return scores, failed


def score_one_by_one(engine: SlotBatch, scorer: Any, images: Tensor) -> tuple[Tensor, Failed]:
    """Rewards (N,) of a round's images (N, ...) by a reward on the device that failed for all of them: it is asked a
    request at a time, in micro-batches full of that one's images."""
    n, M = len(images), engine.micro_batch
    slot, t = engine.lane_slot[:n], engine.lane_real[1, :n]
    live = engine.lane_live[:n].nonzero().flatten()
    scores, failed = images.new_full((n,), -math.inf, dtype=torch.float32), Failed()
    for each in sorted(set(slot[live].tolist())):
        try:
            for part in live[slot[live] == each].split(M):
                rows = part[torch.arange(M, device=part.device) % len(part)]
                cond, shown, times = engine.take(engine.reward_cond, slot[rows]), images[rows], t[rows]
                scores[part] = asked(scorer, shown, times, cond)[: len(part)]
        except FlowfastError as error:
            failed[each] = error
    return scores, failed


def asked(scorer: Any, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """Scores of a reward on the device, under the policy."""
    return rewards.score(scorer, lambda: scorer(images, t, cond), images)
