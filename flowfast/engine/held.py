"""The state of an engine between two rounds, and back from it. A round that is under way will be run again, from the
same state and with the same noise."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flowfast.engine.core import EngineCore
from flowfast.engine.request import Job

COUNTS = ("rows_seen", "rounds", "nan_rewards")


def held(core: EngineCore) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What all batches remember, by name, on the CPU; and what the host knows, for JSON."""
    tensors: dict[str, Tensor] = {}
    groups: list[dict[str, Any]] = []
    for batch in sorted(core.scheduler.batches, key=lambda batch: batch.number):
        if batch.live:
            core.tell(batch, all_of_them=True)
            tensors |= {f"group{len(groups)}.{name}": tensor for name, tensor in batch.runner.held().items()}
            slots = {str(slot): batch.job(slot).number for slot in batch.taken}
            groups.append({**batch.runner.facts(), "apart": batch.apart, "index_of": slots})
    counts = {name: getattr(core, name) for name in COUNTS}
    return tensors, {"groups": groups, "counts": counts, "splits": core.splits, "micro_batch": core.last_micro_batch}


def restore(core: EngineCore, tensors: dict[str, Tensor], facts: dict[str, Any], jobs: dict[int, Job]) -> None:
    """Goes back to what was held; jobs by their numbers, without those that have ended since. Raises ValueError where
    that is of another engine."""
    for name, value in facts["counts"].items():
        setattr(core, name, value)
    core.micro_batch = core.rows_at(core.rounds)
    for g, found in enumerate(facts["groups"]):
        slots = {int(slot): jobs[number] for slot, number in found["index_of"].items() if number in jobs}
        if not slots:
            continue
        batch = core.new_batch(next(iter(slots.values())), len(found["plans"]), found["apart"])
        for slot, job in slots.items():
            batch.put(slot, job)
        prefix = f"group{g}."
        own = {name.removeprefix(prefix): each for name, each in tensors.items() if name.startswith(prefix)}
        batch.go_on(own, found)
        for slot in {int(slot) for slot in found["index_of"]} - slots.keys():
            batch.runner.leave(slot)
        core.go_on(batch)
