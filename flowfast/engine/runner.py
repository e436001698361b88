"""One batch of slots and its rounds, on the device; rewards on the host are asked for here.

A round is `start`, which sends it off, and `finish`, which lets its scores decide. Between the two a reward on the host
may be at work, while another batch starts.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from contextlib import suppress
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from flowfast import rewards
from flowfast.engine import spans
from flowfast.engine.checkpoint import load_into, state_of
from flowfast.engine.deadline import Rest
from flowfast.engine.graphs import Graphs
from flowfast.engine.loaded import Loaded
from flowfast.engine.outputs import LAG, Jobs, Report, Reports, Taken, take
from flowfast.engine.request import Job
from flowfast.engine.scoring import Failed, score_on_host, score_one_by_one
from flowfast.engine.transfer import Transfers
from flowfast.errors import FlowfastError
from flowfast.methods.forecast import Forecast
from flowfast.rounds.batch import Limits, SlotBatch

DECIDING, DECODING = ", as it decided on one", ", as a sample was decoded"  # where a smaller micro-batch is no help


class Runner(Protocol):
    """What an engine asks of a batch. Tests have one without a model."""

    slots: int
    micro_batch: int
    stage: str
    """What is under way that a smaller micro-batch would not help; "": nothing."""

    @property
    def rounds(self) -> list[int]:
        """Of each slot's request."""

    @property
    def rows(self) -> tuple[int, int]:
        """Of the last round: rows that the model saw, those of them that were scored; padding included."""

    def admit(self, slot: int, job: Job) -> None:
        """A request moves in."""

    def start(self, jobs: Jobs) -> None:
        """Sends a round of these jobs, by slot, off."""

    def finish(self) -> dict[int, FlowfastError]:
        """Lets the scores decide; the slots whose reward failed, with its error."""

    def keep_pace(self) -> None:
        """Where the device runs behind the host, waits until no more than two rounds are under way, so that the host's
        clock tells what a round takes."""

    def drop(self) -> None:
        """Forgets the round that is under way: it will be run again, from the same state."""

    def report(self, jobs: Jobs) -> None:
        """Sends off how the requests stand after a round."""

    def reports(self, all_of_them: bool = False) -> list[Report]:
        """Those that have come, or all."""

    def rest(self, slots: Sequence[int]) -> Rest:
        """Rows of the rounds to come, these slots together."""

    def done(self, slot: int) -> bool:
        """Has the slot's request nothing left to do?"""

    def limit(self, slot: int, forecast: Forecast) -> None:
        """The slot's request may spend no more than this."""

    def leave(self, slot: int) -> None:
        """The slot's request goes, without a sample."""

    def take(self, slot: int, job: Job) -> Taken:
        """The slot's request goes, with what it got."""

    def held(self) -> dict[str, Tensor]:
        """All that a round leaves to the next one, on the CPU; what is not decided yet is not in it."""

    def facts(self) -> dict[str, Any]:
        """What the host knows of it, for JSON."""

    def go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Goes back to what was held, its jobs being admitted. Raises ValueError where that is of another batch."""


class LiveRunner:
    """A batch of a model. Raises what model and rewards raise; torch.OutOfMemoryError leaves the state as it was before
    the round unless `stage` says otherwise."""

    def __init__(
        self, loaded: Loaded, job: Job, *, slots: int, micro_batch: int, apart: bool = False, tells: bool = False,
        records: bool = False,
    ):  # fmt: skip
        """job: an example of those that it will run. apart: rewards on the host run on a thread of their own. tells,
        records: as `Reports` takes them."""
        self.loaded, self.resolved, self.slots, self.micro_batch = loaded, job.resolved, slots, micro_batch
        self.scorer = loaded.reward(job.request.reward)
        self.on_host, self.apart = rewards.on_host(self.scorer), apart
        self.steered = self.resolved.params.gradient is not None
        self.stage = ""
        self._known: tuple[Any, Any] = (None, None)
        self.scored: Future[tuple[Tensor, Failed]] | None = None
        self.failed: Failed = {}
        self._events: deque[Any] = deque()
        self.over: set[int] = set()
        """Slots whose chains have all ended before their plan."""
        recorder = loaded.recorder()
        self.engine = self._batch(job, recorder is not None)
        self.forward, self.judge, self.decisions = (Graphs(recorder) for _ in range(3))
        self.transfers = Transfers(loaded.device, LAG + 1)
        self._reports = Reports(self.engine, self.transfers, tells, records)
        e = self.engine
        self.inputs = [e.x_lane, e.x0_lane, e.lane, e.lane_real, e.null_lane, e.null_u, e.broken]
        self.inputs += [value for group in (e.cond, e.null_cond, e.reward_cond) for value in group.values()]
        host = torch.full((e.lane_live.numel(),), -math.inf, dtype=torch.float32, device="cpu")
        self.scores = host.pin_memory() if loaded.device.type == "cuda" else host
        self.rewards = torch.empty_like(self.scores, device=loaded.device)
        loaded.checked.keeps_velocity |= self.resolved.passes == 2 or (apart and e.direct)

    def _batch(self, like: Job, captured: bool) -> SlotBatch:
        reward = nn.Identity() if self.on_host else self.scorer
        return self.resolved.batch(
            self.loaded.flow, rewards.graded(reward) if self.steered else reward, like.room, self.slots,
            self.micro_batch, like.cond, like.reward_cond, self.loaded.device, null_cond=like.null_cond,
            captured=captured,
        )  # fmt: skip

    # ---- slots ----

    @property
    def rounds(self) -> list[int]:
        return self.engine.rounds

    @property
    def rows(self) -> tuple[int, int]:
        return self.engine.size()

    def admit(self, slot: int, job: Job) -> None:
        until, resolved = job.request.params.until, job.resolved
        self.over.discard(slot)
        self.engine.admit(
            slot, job.cond, job.null_cond, job.reward_cond, job.noise_key, self._limits(job), resolved.guidance,
            math.inf if until is None else until, self._given(job), job.request.params.first_chain,
        )  # fmt: skip

    def _given(self, job: Job) -> Tensor | None:
        """The latents (chains, n) that a request brought along."""
        if job.request.latents is None:
            return None
        own = job.request.latents.reshape(-1, self.engine.numel).expand(job.plan.chains, -1)
        missing = self.engine.chains - job.plan.chains
        return torch.cat([own, own.new_zeros(missing, self.engine.numel)]).to(self.loaded.device)

    def _limits(self, job: Job) -> Limits:
        """Of a whole plan; those of one budget are made once."""
        if self._known[0] is not job.plan:
            start = job.plan.start or [True] * job.plan.chains
            self._known = (job.plan, limits_on(self.engine, job.forecast, job.plan.quota, job.plan.left, start))
        return self._known[1]

    def limit(self, slot: int, forecast: Forecast) -> None:
        start = [amount > 0 for amount in forecast.left]
        self.engine.limit(slot, limits_on(self.engine, forecast, forecast.quota, forecast.left, start))

    def rest(self, slots: Sequence[int]) -> Rest:
        e = self.engine
        return Rest(*(summed(slots, plans, e.rounds) for plans in (e.plans, e.null_plans, e.scored_plans)))

    def done(self, slot: int) -> bool:
        return self.engine.rounds[slot] >= len(self.engine.plans[slot]) or slot in self.over

    def leave(self, slot: int) -> None:
        self.engine.release(slot)

    def take(self, slot: int, job: Job) -> Taken:
        self.stage = DECODING
        found = take(self.loaded, self.engine, self.transfers, slot, job)
        self.stage = ""
        return found

    def report(self, jobs: Jobs) -> None:
        self._reports.send(jobs)

    def reports(self, all_of_them: bool = False) -> list[Report]:
        found = self._reports.read(all_of_them)
        for report in found:
            if not all(report.running):
                self.over |= {slot for slot, running in enumerate(report.running) if not running and report.jobs[slot]}
        return found

    # ---- a round ----

    def start(self, jobs: Jobs) -> None:
        engine, clock = self.engine, self.loaded.clock
        clock.mark()
        self._reports.begin(jobs)
        engine.lay()
        with spans.BRANCH:
            engine.branch()
        clock.mark("search")
        if self.steered and self.forward.recorder:  # its decoder and reward have run with the model
            with spans.VELOCITY:
                found = self.forward.run((engine.padded, engine.null_padded), self._all_of_it, self.inputs)
            clock.mark("model")
            return self._decide(found)
        with spans.VELOCITY:
            self.forward.run((engine.padded, engine.null_padded), engine.evaluate, self.inputs)
        clock.mark("model")
        n = engine.scored_padded
        if n == 0:  # nobody reads a score of this round
            if not self.on_host:
                return self._decide(engine.score(engine.decode()))
            self.scored = done(lambda: (self.scores[:0], {}))
        elif self.on_host:
            with spans.DECODE:
                images = self.judge.run(n, engine.decode, self.inputs)
            clock.mark("decode")
            self._ask(images, jobs)
        else:
            self._decide(self._judged(n))

    def _all_of_it(self) -> Tensor:
        self.engine.evaluate()
        return self.device_rewards(self.engine.decode())

    def _judged(self, n: int) -> Tensor:
        """Rewards (n,) of the scored lanes by a reward on the device."""
        clock = self.loaded.clock
        if self.judge.captures(n):
            with spans.REWARD, suppress(FlowfastError):  # decoder included; what fails is seen to below
                found: Tensor = self.judge.run(n, lambda: self.device_rewards(self.engine.decode()), self.inputs)
                clock.mark("model")
                return found
        with spans.DECODE:
            images = self.engine.decode()
        clock.mark("decode")
        with spans.REWARD:
            try:
                found = self.device_rewards(images)
            except FlowfastError:
                if not self.loaded.by_request:
                    raise
                found, self.failed = score_one_by_one(self.engine, self.scorer, images)
        clock.mark("reward")
        return found

    def device_rewards(self, images: Tensor) -> Tensor:
        return rewards.score(self.scorer, lambda: self.engine.score(images), images)

    def finish(self) -> dict[int, FlowfastError]:
        """Waits for the host's scores."""
        if self.scored is None:
            failed, self.failed = self.failed, {}
            return failed
        self.loaded.clock.mark()
        waiting, self.scored = self.scored, None
        scores, failed = waiting.result()
        self.loaded.clock.mark("reward")
        self._decide(self.rewards[: len(scores)].copy_(scores, non_blocking=True))
        return failed

    def keep_pace(self) -> None:
        if self.loaded.device.type == "cuda":
            self._events.append(torch.cuda.Event())
            self._events[-1].record()
            if len(self._events) > 2:
                self._events.popleft().synchronize()

    def drop(self) -> None:
        """Waits for its reward on the host, for none runs twice at once."""
        if self.scored is not None:
            wait([self.scored])
            self.scored = None

    def _decide(self, found: Tensor) -> None:
        engine = self.engine
        with spans.DECIDE:
            self._reports.note_lanes()
            self.stage = DECIDING
            engine.turn()
            if engine.method.regroups and self.decisions.recorder:
                static = self.rewards[: len(found)].copy_(found)
                self.decisions.run(len(found), partial(engine.decide, static), [*self.inputs, static])
            else:
                engine.decide(found)
            self.stage = ""
        self.loaded.clock.mark("search")

    # ---- rewards on the host ----

    def _ask(self, images: Tensor, jobs: Jobs) -> None:
        engine, n = self.engine, images.shape[0]
        read = engine.scored.index_select(0, engine.lane_transition[:n]).logical_and_(engine.lane_live[:n])
        lanes = (read, engine.lane_slot[:n], engine.lane_real[1, :n], engine.image_sum[:n])
        transfer = self.transfers.send([images, *lanes])
        texts = ["" if job is None else job.request.prompt for job in jobs]
        loaded = self.loaded
        work = partial(score_on_host, self.scorer, transfer, texts, self.scores, loaded.most_images, loaded.by_request)
        self.scored = loaded.worker().submit(work) if self.apart else done(work)

    # ---- the same state in other micro-batches ----

    def held(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in state_of(self.engine).items()}

    def facts(self) -> dict[str, Any]:
        e = self.engine
        plans = {"plans": e.plans, "scored": e.scored_plans, "null": e.null_plans}
        return {**plans, "rounds": list(e.rounds), "over": sorted(self.over)}

    def go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        load_into(self.engine, tensors)
        self.engine.rounds, self.over = list(facts["rounds"]), set(facts["over"])
        plans = zip(facts["plans"], facts["scored"], facts["null"], strict=True)
        for slot, (widths, scored, null) in enumerate(plans):
            self.engine.expect(slot, widths, scored, null)


def limits_on(
    engine: SlotBatch, forecast: Forecast, quota: list[list[int]], left: list[int], start: list[bool]
) -> Limits:
    """Limits on the device of a batch, without a wait; chains that a smaller plan does not have never start."""
    missing, device = engine.chains - len(left), engine.table.device
    nothing = [[0] * engine.transitions] * missing
    host = [torch.tensor(each, device="cpu") for each in (quota + nothing, left + [0] * missing)]
    host.append(torch.tensor(start + [False] * missing, device="cpu"))
    if device.type == "cuda":
        host = [each.pin_memory() for each in host]
    of_quota, of_left, of_start = (each.to(device, non_blocking=True) for each in host)
    return Limits(of_quota, of_left, of_start, forecast.widths, forecast.scored, forecast.null)


def summed(slots: Sequence[int], plans: list[list[int]], rounds: list[int]) -> list[int]:
    """The rounds to come of these slots, added up."""
    of_slots = [plans[slot][rounds[slot] :] for slot in slots]
    longest = max(map(len, of_slots), default=0)
    return [sum(of[at] for of in of_slots if at < len(of)) for at in range(longest)]


def done(work: Callable[[], Any]) -> Future[Any]:
    """A future that is there already."""
    future: Future[Any] = Future()
    future.set_result(work())
    return future
