"""Batches without a model, for tests of the engine's core.

A request's state is a chain of checksums over its name and its own rounds, each with the reward that it drew, so a
sample shows whether a neighbour, a repeated round or a foreign one changed it. `World` counts the rows that each
request cost, holds the clock, and has faults in order: of rewards, models, prompts, samples and memory.
"""

from __future__ import annotations

import zlib
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flowfast.config import SearchParams
from flowfast.engine.deadline import Rest
from flowfast.engine.outputs import Jobs, Report, Taken
from flowfast.engine.request import Job, Request
from flowfast.engine.runner import DECIDING, DECODING, summed
from flowfast.engine.scheduler import Batch
from flowfast.errors import FlowfastError, ModelError, OptionError, PromptError, RewardError
from flowfast.methods.forecast import Forecast
from flowfast.methods.plan import Plan
from flowfast.types import Ranked, Sample, Winner

RESOLVED: Any = SimpleNamespace(passes=1)


@dataclass(frozen=True)
class Ask:
    """What a test asks for: `transitions` of `tries` candidates each, one a round."""

    id: str
    transitions: int = 3
    tries: int = 1
    kind: str = "plain"
    """Of "host..." two batches take turns."""
    priority: int = 0
    deadline: float | None = None
    ends_at: int = 1 << 30
    """The round of its own after which it has ended, though its plan goes on."""

    @property
    def budget(self) -> int:
        return self.transitions * self.tries


def job_of(ask: Ask, number: int, now: float) -> Job:
    T = ask.transitions
    plan = Plan(chains=1, lanes=1, quota=[[ask.tries] * T], left=[ask.budget], accept=[False] * T)
    params = SearchParams.model_construct(method=ask.kind, seed=0, repeat=0, budget=ask.budget, until=ask.ends_at)
    request = Request(id=ask.id, prompt=ask.id, params=params, reward="", priority=ask.priority, deadline=ask.deadline)
    due = None if ask.deadline is None else now + ask.deadline
    return Job(request, number, now, RESOLVED, plan, plan, plan.forecast(), {}, {}, {}, ask.kind, due)


def checksum(*numbers: Any) -> int:
    return zlib.crc32(repr(numbers).encode())


def link(state: int, id: str, at: int) -> int:
    """The state after one more round, the at-th of its own."""
    reward = checksum(id, at, state) % 1000
    return checksum(state, reward)


def alone(ask: Ask, rounds: int) -> int:
    """The state of a request after so many rounds of its own."""
    state = 0
    for at in range(1, min(rounds, ask.ends_at) + 1):
        state = link(state, ask.id, at)
    return state


@dataclass
class World:
    """The clock, the faults to come, and what was seen."""

    now: float = 0.0
    seconds: float = 1.0
    """Of a micro-batch, or of a round."""
    of_round: bool = False
    slots: int = 4
    most_batches: int = 1 << 30
    """There is no memory for more."""
    lag: int = 0
    """Rounds that reports are behind."""
    reward_fails: set[tuple[str, int]] = field(default_factory=set)
    """(id, its round)."""
    model_fails: set[tuple[str, int]] = field(default_factory=set)
    admit_fails: set[str] = field(default_factory=set)
    take_fails: dict[str, str] = field(default_factory=dict)
    """raises, answers or memory, by id."""
    make_fails: dict[str, str] = field(default_factory=dict)
    """Batches that a request is the first of: option, or memory."""
    memory: deque[str] = field(default_factory=deque)
    """The next rounds that run out of memory: "" before they decided, or as they did."""
    rows: Counter[str] = field(default_factory=Counter)
    """Through the model, by id."""
    decided: Counter[str] = field(default_factory=Counter)
    """Those of rounds that were decided: no other is run again."""
    blamed: Counter[str] = field(default_factory=Counter)
    """Requests of rounds that the model failed."""
    wrong: list[str] = field(default_factory=list)
    """What an engine must not do."""
    sizes: list[int] = field(default_factory=list)
    """Micro-batches of the batches that were made."""


class FakeMaker:
    def __init__(self, world: World):
        self.world = world

    def batches(self, job: Job, micro_batch: int) -> int:
        return 2 if str(job.kind).startswith("host") else 1

    def slots(self, job: Job, batches: int) -> int:
        return -(-self.world.slots // batches)

    def has_room(self, batches: list[Batch], job: Job, micro_batch: int, slots: int) -> bool:
        return len(batches) < self.world.most_batches

    def runner(self, job: Job, micro_batch: int, slots: int, apart: bool) -> FakeRunner:
        fault = self.world.make_fails.pop(job.request.id, None)
        if fault is not None and (fault == "option" or micro_batch == 1):
            self.world.blamed[job.request.id] += 1
        if fault is not None:
            raise OptionError("no room for it") if fault == "option" else torch.OutOfMemoryError("no room for it")
        self.world.sizes.append(micro_batch)
        return FakeRunner(self.world, slots, micro_batch)

    def ran_out(self, before: int, micro_batch: int) -> None:
        pass


class FakeRunner:
    def __init__(self, world: World, slots: int, micro_batch: int):
        self.world, self.slots, self.micro_batch, self.stage = world, slots, micro_batch, ""
        self.rounds, self.over = [0] * slots, set[int]()
        self.state, self.nfe = torch.zeros(slots, dtype=torch.int64), torch.zeros(slots, dtype=torch.int64)
        self.alive = torch.zeros(slots, dtype=torch.bool)
        self.jobs: list[Job | None] = [None] * slots
        self.plans: list[list[int]] = [[] for _ in range(slots)]
        self.rows, self.started = (0, 0), 0
        self.pending: list[int] | None = None
        self.sent: deque[Report] = deque()

    # ---- slots ----

    def admit(self, slot: int, job: Job) -> None:
        self.wrong_while_under_way("admitted")
        self.world.make_fails.pop(job.request.id, None)
        if self.jobs[slot] is not None:
            self.world.wrong.append(f"{job.request.id} was admitted into a slot that is taken")
        if job.request.id in self.world.admit_fails:
            raise PromptError(f"cannot read {job.request.id!r}")
        self.jobs[slot], self.plans[slot], self.rounds[slot] = job, list(job.forecast.widths), 0
        self.state[slot], self.nfe[slot], self.alive[slot] = 0, 0, True
        self.over.discard(slot)

    def wrong_while_under_way(self, what: str) -> None:
        if self.pending is not None:
            self.world.wrong.append(f"{what} in the middle of a round")

    def limit(self, slot: int, forecast: Forecast) -> None:
        self.wrong_while_under_way("limited")
        self.plans[slot] = list(forecast.widths)

    def rest(self, slots: Sequence[int]) -> Rest:
        rows = summed(slots, self.plans, self.rounds)
        return Rest(rows, [0] * len(rows), rows)

    def done(self, slot: int) -> bool:
        return self.rounds[slot] >= len(self.plans[slot]) or slot in self.over

    def leave(self, slot: int) -> None:
        self.wrong_while_under_way("left")
        self.jobs[slot], self.plans[slot], self.alive[slot] = None, [], False

    def take(self, slot: int, job: Job) -> Taken:
        state, nfe, fault = int(self.state[slot]), int(self.nfe[slot]), self.world.take_fails.get(job.request.id)
        self.stage = DECODING
        self.leave(slot)
        if fault == "memory":
            raise torch.OutOfMemoryError("no room for a picture")
        if fault == "raises":
            raise ModelError("the decoder failed")
        self.stage = ""
        if fault == "answers":
            return ModelError("no finished sample has a reward"), 1
        job.nfe, picture = nfe, torch.tensor([state])
        top = Ranked(float(state), picture, picture, picture, Winner(0, 0, 0, 0, ()))
        return Sample(
            prompt=job.request.id, method="", seed=0, top=(top,), budget_nfe=job.request.params.budget or 0, nfe=nfe,
            nfe_speculative=0, evaluations=nfe, reward_calls=nfe, unspent=0,
        ), 0  # fmt: skip

    # ---- a round ----

    def start(self, jobs: Jobs) -> None:
        world, slots = self.world, [slot for slot, job in enumerate(jobs) if job is not None]
        self.started += 1
        self.wrong_while_under_way("started another round")
        if [slot for slot, job in enumerate(self.jobs) if job is not None] != slots:
            world.wrong.append(f"the books have {slots}, the batch {self.jobs}")
        names = {slot: job.request.id for slot, job in enumerate(jobs) if job is not None}
        world.wrong += [f"{job.request.id} ran after its abort" for job in jobs if job is not None and job.aborted]
        if world.memory and world.memory[0] == "":
            world.memory.popleft()
            if self.micro_batch == 1:
                world.blamed.update(names.values())
            raise torch.OutOfMemoryError("no room for a round")
        if any((name, self.rounds[slot] + 1) in world.model_fails for slot, name in names.items()):
            world.blamed.update(names.values())
            raise ModelError("the model answered nonsense")
        on = [slot for slot in slots if not self.done(slot) and self.alive[slot]]
        for slot in on:
            world.rows[names[slot]] += self.plans[slot][self.rounds[slot]]
        width = sum(self.plans[slot][self.rounds[slot]] for slot in on)
        padded = max(1, -(-width // self.micro_batch)) * self.micro_batch
        self.rows = (padded, padded)
        self.pending = slots
        world.now += world.seconds * (1 if world.of_round else padded / self.micro_batch)

    def finish(self) -> dict[int, FlowfastError]:
        world, failed = self.world, dict[int, FlowfastError]()
        assert self.pending is not None
        if world.memory and world.memory[0]:
            world.memory.popleft()
            world.blamed.update(job.request.id for job in self.jobs if job is not None)
            self.stage = DECIDING
            raise torch.OutOfMemoryError("no room for a decision")
        for slot in self.pending:
            job, running = self.jobs[slot], not self.done(slot)
            assert job is not None
            id, at = job.request.id, self.rounds[slot] + 1
            self.rounds[slot] += running
            if running and self.alive[slot]:
                self.state[slot] = link(int(self.state[slot]), id, at)
                self.nfe[slot] += self.plans[slot][at - 1]
                world.decided[id] += self.plans[slot][at - 1]
                if (id, at) in world.reward_fails:
                    self.state[slot] = -1
                    failed[slot] = RewardError(f"no reward of {id!r}")
                until: Any = job.request.params.until
                self.alive[slot] = at < until and at < len(self.plans[slot])
        self.pending = None
        return failed

    def keep_pace(self) -> None:
        pass

    def drop(self) -> None:
        self.pending = None

    def report(self, jobs: Jobs) -> None:
        best = [float(state % 1000) for state in self.state.tolist()]
        self.sent.append(Report(list(jobs), self.alive.tolist(), self.nfe.tolist(), best, [], self.rows[0]))

    def reports(self, all_of_them: bool = False) -> list[Report]:
        found = []
        while self.sent and (all_of_them or len(self.sent) > self.world.lag):
            found.append(self.sent.popleft())
            running, jobs = found[-1].running, found[-1].jobs
            self.over |= {slot for slot in range(self.slots) if jobs[slot] and not running[slot]}
        return found

    # ---- the same state elsewhere ----

    def held(self) -> dict[str, Tensor]:
        return {"state": self.state.clone(), "nfe": self.nfe.clone(), "alive": self.alive.clone()}

    def facts(self) -> dict[str, Any]:
        plans = [list(plan) for plan in self.plans]
        return {"plans": plans, "scored": plans, "rounds": list(self.rounds), "over": sorted(self.over)}

    def go_on(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        self.state, self.nfe, self.alive = (tensors[name].clone() for name in ("state", "nfe", "alive"))
        self.plans, self.rounds = [list(plan) for plan in facts["plans"]], list(facts["rounds"])
        self.over = set(facts["over"])
