"""Where a round runs out of memory: the same state goes on in smaller micro-batches."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

import torch

from flowfast.engine import clock
from flowfast.errors import ModelError

if TYPE_CHECKING:
    from flowfast.engine.core import EngineCore
    from flowfast.engine.scheduler import Batch


def no_memory(core: EngineCore, stage: str = "") -> ModelError:
    """The error where nothing smaller can be tried; stage: what was under way."""
    rows = core.micro_batch
    return ModelError(
        f"out of memory with micro-batches of {rows} after {core.rounds} rounds{stage}: choose a smaller "
        "micro_batch, fewer slots or finalists, or load the model with offload or vae_tiling" + core.kept_in
    )


def less_memory(core: EngineCore, batch: Batch | None) -> None:
    """After a step ran out of memory, in a round of this batch: a smaller micro-batch where that may help."""
    stage = "" if batch is None else batch.runner.stage
    if not stage and core.micro_batch > 1:
        return shrink(core)
    if not core.contain or batch is None:
        raise no_memory(core, stage)
    core.end(batch, no_memory(core, stage))


def shrink(core: EngineCore) -> None:
    """Goes on with half of the micro-batch, and remembers until which round it was larger."""
    rows = core.micro_batch
    core.splits = [split for split in core.splits if split[0] <= core.rounds]
    if core.rounds > max((rounds for rounds, _ in core.splits), default=0):
        core.splits.append((core.rounds, rows))
    core.last_micro_batch = rows // 2
    core.halved += 1
    core.make.ran_out(rows, rows // 2)
    resize(core, rows // 2)


def resize(core: EngineCore, rows: int) -> None:
    """Goes on with micro-batches of another size, from what was decided last."""
    for batch in core.under_way:
        batch.runner.drop()
        batch.under_way = False
    core.under_way.clear()
    for batch in core.scheduler.in_order():
        core.tell(batch, all_of_them=True)
        for slot in batch.taken:
            job, at = batch.job(slot), batch.runner.rounds[slot]
            if at > max((rounds for rounds, _ in job.splits), default=0):
                job.splits.append((at, batch.runner.micro_batch))
        if not batch.live:
            core.scheduler.remove(batch)
    core.micro_batch = rows
    states = [(batch, batch.runner.held(), batch.runner.facts()) for batch in core.scheduler.in_order()]
    for batch, *_ in states:
        del batch.runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    for batch, held, facts in states:
        try:
            batch.runner = core.make.runner(batch.example, rows, len(batch.jobs), batch.apart)
            batch.go_on(held, facts)
            batch.pacer.restart()
        except torch.OutOfMemoryError:  # not even for what stood there before
            if not core.contain:
                raise no_memory(core) from None
            core.end(batch, no_memory(core), lost=True)
    core.last = clock.now()
