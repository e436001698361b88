"""How large the batches of an engine are, and what runs them."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Any
from weakref import WeakKeyDictionary

from flowfast import rewards
from flowfast.engine.loaded import Loaded
from flowfast.engine.request import Job
from flowfast.engine.runner import LiveRunner
from flowfast.engine.scheduler import Batch
from flowfast.memory import size_of
from flowfast.methods.forecast import Forecast

log = logging.getLogger("flowfast.engine")
BATCH_CAPS: MutableMapping[Any, int] = WeakKeyDictionary()
"""The micro-batch that fitted into memory, of flows for which a larger one did not."""


class LiveMaker:
    """Batches of a model.

    Args:
        slots: prompts of a kind that run at once.
        overlap: with a reward on the host, two batches of a kind take turns where each fills micro-batches.
        tells: after each round, what was spent and found; records: what it evaluated, too.
        share: of the device's memory that all batches may take together, and a quarter of it one; None: all, each.
    """

    def __init__(
        self, loaded: Loaded, *, slots: int, overlap: bool = True, tells: bool = True, records: bool = False,
        share: float | None = None,
    ):  # fmt: skip
        self.loaded, self._slots, self.overlap, self.tells, self.records = loaded, slots, overlap, tells, records
        self.share = share

    def overlaps(self, reward: str, forecast: Forecast) -> bool:
        """May two batches take turns? Not where the reward is asked for in few rounds, as in best-of-n."""
        if not self.overlap or self._slots == 1 or not rewards.on_host(self.loaded.reward(reward)):
            return False
        return 2 * sum(map(bool, forecast.scored)) >= len(forecast.scored)

    def usual_slots(self, reward: str, forecast: Forecast) -> int:
        """Of a batch, where two take turns if they may."""
        return -(-self._slots // 2) if self.overlaps(reward, forecast) else self._slots

    def batches(self, job: Job, micro_batch: int) -> int:
        if not self.overlaps(job.request.reward, job.forecast):
            return 1
        return 2 if self.slots(job, 2) * max(job.forecast.widths) >= self.rows(job, micro_batch) else 1

    def rows(self, job: Job, micro_batch: int) -> int:
        """Of a model call of the job's kind."""
        return micro_batch if job.rows is None else min(job.rows, micro_batch)

    def slots(self, job: Job, batches: int) -> int:
        slots = -(-self._slots // batches)
        while self.share is not None and slots > 1 and self._bytes(job, 1, slots) > self.most_bytes // 4:
            slots //= 2
        return slots

    @property
    def most_bytes(self) -> int:
        """Of all batches together."""
        return int((self.share or 1.0) * size_of(self.loaded.device))

    def _bytes(self, job: Job, micro_batch: int, slots: int) -> int:
        return job.resolved.bytes(self.loaded.flow, job.room, slots, micro_batch)

    def has_room(self, batches: list[Batch], job: Job, micro_batch: int, slots: int) -> bool:
        taken = sum(self._bytes(batch.example, micro_batch, len(batch.jobs)) for batch in batches)
        return self.share is None or taken + self._bytes(job, micro_batch, slots) <= self.most_bytes

    def runner(self, job: Job, micro_batch: int, slots: int, apart: bool) -> LiveRunner:
        rows = self.rows(job, micro_batch)
        return LiveRunner(
            self.loaded, job, slots=slots, micro_batch=rows, apart=apart, tells=self.tells, records=self.records
        )

    def ran_out(self, before: int, micro_batch: int) -> None:
        log.warning("out of memory with micro-batches of %d: trying %d", before, micro_batch)
        self.loaded.most_images = micro_batch
        BATCH_CAPS[self.loaded.original] = micro_batch
