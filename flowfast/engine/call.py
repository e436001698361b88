"""One call of `flowfast.search`: all of its prompts go into an engine, which is stepped until they are done."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flowfast import rewards, secrets
from flowfast.calibration.auto import recorded, settled_config
from flowfast.config import SearchConfig
from flowfast.engine import checkpoint as checkpoints
from flowfast.engine import clock
from flowfast.engine.core import EngineCore
from flowfast.engine.deadline import Pace, learn_pace
from flowfast.engine.held import held, restore
from flowfast.engine.loaded import Loaded
from flowfast.engine.maker import LiveMaker
from flowfast.engine.measure import measure, micro_batch_of
from flowfast.engine.prepare import Known, Preparer
from flowfast.engine.request import Event, Failed, Finished, Job, Progress, Request
from flowfast.errors import BudgetError, FlowfastError, ModelError, OptionError
from flowfast.files import plain
from flowfast.resolve import Resolved, checked_latents, resolve
from flowfast.rounds.steered import frozen
from flowfast.types import Candidate, Flow, Sample, SearchResult
from flowfast.version import versions

CHECKPOINT_SECONDS = 30.0
MEMORY_OPTIONS = {"device", "offload", "vae_slicing", "vae_tiling"}
"""Options of a model that a search may be resumed with where it ran out of memory."""


@dataclass(frozen=True)
class Told:
    """Whom a search tells of what it does."""

    on_round: Callable[[list[Candidate]], None] | None = None
    on_sample: Callable[[int, Sample], None] | None = None
    on_progress: Callable[[int, int], None] | None = None


class Call:
    """A search for some prompts, with one configuration.

    Args:
        flow, prompts, scorer, resolved: the model, what it draws, the reward, what the configuration means.
        latents: (P, *shape) or (P, C, *shape), own initial noise.
        pace_name: names the reward if its pace may be kept for later calls.
        before: what a checkpoint has.
        first_chains: of each prompt, in place of the configuration's.
        started: by the clock.
    """

    def __init__(
        self, flow: Flow, prompts: list[str], scorer: Any, resolved: Resolved, latents: Tensor | None,
        pace_name: str | None, told: Told, config: SearchConfig, *, checkpoint: checkpoints.Checkpoint | None = None,
        checkpoint_seconds: float | None = None, before: checkpoints.Held | None = None,
        asked_micro_batch: int | None = None, started: float = 0.0, first_chains: Sequence[int] | None = None,
    ):  # fmt: skip
        self.config, self.resolved, self.prompts, self.scorer, self.told = config, resolved, prompts, scorer, told
        self.checkpoint, self.before, self.asked_micro_batch = checkpoint, before, asked_micro_batch
        self.checkpoint_seconds = CHECKPOINT_SECONDS if checkpoint_seconds is None else checkpoint_seconds
        self.saved, self.started, self.measuring = clock.now(), started, 0.0
        self.steered = () if config.gradient is None else (flow, scorer)
        self.loaded = Loaded(
            flow, {config.reward: scorer}, cuda_graphs=config.cuda_graphs, compile=config.compile, by_request=False
        )
        self.known = self._encode()
        if (config.budget is None) == (config.seconds is None):
            raise OptionError(
                f"expected a budget in NFE or seconds, got {config.budget} and {config.seconds}: give one"
            )
        self.slots = config.slots or min(len(prompts), 16)
        self.tells = bool(told.on_round or told.on_progress)
        self.maker = LiveMaker(
            self.loaded, slots=self.slots, overlap=config.overlap, tells=self.tells, records=bool(told.on_round)
        )
        self.pace: Pace | None = None
        self.pace_key: Any = None
        self.seconds = before.facts["seconds"] if before else config.seconds
        self.budget = config.budget or 0
        if config.seconds is not None:
            self._measure(config.seconds, pace_name)
            self._settle()
        if self.budget < 1:
            raise BudgetError(f"the budget must be at least 1 NFE, got {self.budget}: raise it")
        if latents is not None:
            latents = checked_latents(latents, len(prompts), flow, resolved, resolved.plan(self.budget))
        self.jobs = self._jobs(latents, first_chains or [config.first_chain] * len(prompts))
        self.samples: list[Sample | None] = [None] * len(prompts)
        self.lost: dict[int, FlowfastError] = {}  # prompts that got no sample
        self.core = self._core()
        self.identity: dict[str, Any] = {}
        if checkpoint:
            self.identity = identity(
                self.config, self.resolved, prompts, scorer, self.loaded.flow.shape, self.budget
            ) | {
                "micro_batch": self.core.last_micro_batch,
                "slots": self.slots,
                "latents": None if latents is None else checkpoints.digest_of(latents.cpu().numpy().tobytes()),
            }

    # ---- before it begins ----

    def _encode(self) -> list[Known]:
        """What model and reward know of each prompt."""
        cond = self.loaded.encode(self.prompts)
        two = self.resolved.passes == 2
        null = self.loaded.flow.encode([self.config.negative_prompt]) if two else {}
        asked = self.loaded.encode_for_reward(self.config.reward, self.prompts, bool(self.steered))

        def row(of: dict[str, Tensor], index: int) -> dict[str, Tensor]:
            return {name: value[index : index + 1] for name, value in of.items()}

        return [Known(row(cond, index), null, row(asked, index)) for index in range(len(self.prompts))]

    def _measure(self, seconds: float, pace_name: str | None) -> None:
        """A budget in NFE, of one in seconds a prompt."""
        found = measure(
            self.loaded, self.maker, self.config, self.resolved, self.prompts, self.known[0], seconds, pace_name
        )
        self.pace, self.pace_key, self.budget, self.config = found.pace, found.key, found.budget, found.config
        self.started, self.measuring = found.started or self.started, found.seconds

    def _settle(self) -> None:
        """Method auto, now that its budget in NFE is known."""
        before, asked = clock.now(), self.config.model_copy(update={"budget": self.budget})
        whole = settled_config(self.loaded.original, self.scorer, asked)
        if whole.picked is None:
            return
        passes, self.resolved = self.resolved.passes, resolve(self.loaded.original, whole.params)
        self.config = whole.with_params(self.resolved.params).model_copy(update={"budget": self.config.budget})
        if self.resolved.passes != passes:
            self.known = self._encode()
        self.measuring += clock.now() - before

    def _jobs(self, latents: Tensor | None, first_chains: Sequence[int]) -> list[Job]:
        preparer, params = Preparer(self.loaded, self.budget), self.config.params
        params = params.model_copy(update={"budget": self.budget, "seconds": None})
        jobs = []
        for index, prompt in enumerate(self.prompts):
            own = None if latents is None else latents[index]
            asked = params.model_copy(update={"first_chain": first_chains[index]})
            request = Request(id=str(index), prompt=prompt, params=asked, reward=self.config.reward, latents=own)
            job = preparer.job(request, index, self.started, self.known[index])
            job.repeats = [(cut[1], cut[2]) for cut in self.config.cuts if cut[0] == index]
            if self.config.seconds is not None:
                job.due = self.started + self.measuring + self.config.seconds * len(self.prompts)
            jobs.append(job)
        return jobs

    def _core(self) -> EngineCore:
        config = self.config
        slots = self.maker.usual_slots(config.reward, self.jobs[0].forecast)
        core = EngineCore(
            self.maker,
            micro_batch=micro_batch_of(self.loaded, config, self.jobs[0].plan, slots),
            splits=config.splits,
            contain=False,
            polls=self.loaded.device.type == "cpu" or self.tells or config.until is not None,
        )
        core.pace = self.pace
        if self.checkpoint:
            core.save = self._save
            core.kept_in = f"; {self.checkpoint.path} has what was found, the same call goes on there"
        return core

    # ---- the whole call ----

    def run(self) -> SearchResult:
        found = self.walk()
        samples = [sample for sample in found if sample is not None]
        if len(samples) < len(found):
            raise without_sample(
                [prompt for prompt, sample in zip(self.prompts, found, strict=True) if sample is None],
                self.lost.get(found.index(None)),
            )
        return self._result(samples)

    @torch.no_grad()
    def walk(self) -> list[Sample | None]:
        """Runs all prompts to their end. None: a prompt has no sample, `lost` says why."""
        try:
            with frozen(*self.steered):
                self._begin()
                while self.core.busy:
                    self._heard(self._step())
                    if self.checkpoint and clock.now() - self.saved >= self.checkpoint_seconds:
                        self._save()
                if self.checkpoint:
                    self._save()
        finally:
            self.loaded.close()
        return self.samples

    def _step(self) -> list[Event]:
        try:
            return self.core.step()
        except BaseException:
            self._heard(self.core.told())  # what was done before
            raise

    def _begin(self) -> None:
        """All prompts wait; where a search was held, it goes back to it."""
        waiting = range(len(self.jobs))
        if self.before is not None:
            waiting = self._resume(self.before)
        for index in waiting:
            self.core.add(self.jobs[index])

    def _heard(self, events: list[Event]) -> None:
        """Rounds are told before a sample that came of them."""
        rounds: list[Progress] = []
        for event in events:
            if isinstance(event, Progress):
                rounds.append(event)
            elif isinstance(event, Finished):
                self._tell(rounds)
                self.samples[int(event.id)] = event.sample
                if self.told.on_sample:
                    self.told.on_sample(int(event.id), event.sample)
            elif isinstance(event, Failed):
                self.lost[int(event.id)] = event.error
        self._tell(rounds)

    def _tell(self, rounds: list[Progress]) -> None:
        """What rounds evaluated, and how far the search is; these are told then."""
        if not rounds:
            return
        if self.told.on_round:
            candidates = [each for event in rounds for each in event.candidates]
            candidates.sort(key=lambda c: (c.prompt, c.round, c.chain, c.transition, c.candidate))
            self.told.on_round(candidates)
        if self.told.on_progress:
            self.told.on_progress(sum(job.nfe for job in self.jobs), self.budget * len(self.prompts))
        rounds.clear()

    def _result(self, samples: list[Sample]) -> SearchResult:
        core, config = self.core, self.config
        seconds = {"total": clock.now() - self.started - self.measuring, **self.loaded.clock.read()}
        if self.pace and self.pace_key and not core.splits:
            worked = sum(batch.pacer.worked for batch in core.scheduler.batches)
            pace = core.scheduler.batches[0].pacer.pace or self.pace
            learn_pace(self.loaded.original, self.pace_key, pace._replace(seconds=seconds["total"] / worked))
        cuts = tuple(sorted((job.number, *cut) for job in self.jobs for cut in job.cuts))
        update = {"micro_batch": core.last_micro_batch, "slots": self.slots, "cuts": cuts, "splits": tuple(core.splits)}
        return SearchResult(
            samples=tuple(samples),
            config=recorded(config.model_copy(update=update)),
            micro_batch=core.micro_batch,
            rows_padded=core.rows_seen - sum(job.nfe for job in self.jobs),
            rounds=core.rounds,
            nan_rewards=core.nan_rewards,
            seconds=seconds,
            overshoot=None if config.seconds is None else seconds["total"] - config.seconds * len(self.prompts),
            versions=versions(),
        )

    # ---- checkpoints ----

    def _save(self) -> None:
        assert self.checkpoint
        tensors, known = held(self.core)
        facts = {**self.identity, **known, "budget": self.budget, "seconds": self.seconds}
        picked = None if self.config.picked is None else self.config.picked.model_dump()
        facts |= {"asked_micro_batch": self.asked_micro_batch, "waiting": self.core.scheduler.count, "picked": picked}
        samples = {index: sample for index, sample in enumerate(self.samples) if sample}
        cuts = [(job.number, *cut) for job in self.jobs for cut in job.cuts]
        self.checkpoint.write(checkpoints.Held(tensors, facts, samples, cuts))
        self.saved = clock.now()

    def _resume(self, before: checkpoints.Held) -> range:
        """The prompts that wait."""
        assert self.checkpoint
        self.checkpoint.check_same(before.facts, self.identity)
        for index, at, left in before.cuts:
            self.jobs[index].cuts.append((at, left))
        for index, sample in before.samples.items():
            self.samples[index], self.jobs[index].nfe = sample, sample.nfe
        try:
            restore(self.core, before.tensors, before.facts, {job.number: job for job in self.jobs})
        except ValueError as error:
            raise self.checkpoint.refused(str(error)) from None
        return range(len(self.prompts) - before.facts["waiting"], len(self.prompts))


def without_sample(prompts: list[str], why: FlowfastError | None) -> ModelError:
    """Prompts got nothing; why: what is known of the first one."""
    return ModelError(
        f"no finished sample of prompt {prompts[0]!r} has a reward ({len(prompts)} such prompts): "
        f"{why or 'so an earlier call found'}; check model, decoder and reward at float32"
    )


def identity(
    config: SearchConfig, resolved: Resolved, prompts: list[str], scorer: Any, shape: Sequence[int], budget: int
) -> dict[str, Any]:
    """What must be equal for a search to go on where another one stopped."""
    apart = {"micro_batch", "splits", "slots", "budget", "seconds", "cuts", "picked", "calibration"}
    # As it will be read again: tuples are lists there, and what JSON does not know is a text.
    told = json.loads(json.dumps(plain(config.model_dump(exclude=apart)), default=repr))
    options = told["model_options"].items()
    told["model_options"] = {
        name: value for name, value in options if name not in MEMORY_OPTIONS and not secrets.is_secret(name)
    }
    told["reward"] = secrets.without_login(told["reward"])
    schedule = resolved.schedule
    times = torch.cat([schedule.table, schedule.time[:, None], schedule.linear_time[:, None]], 1)
    return {
        "prompts": checkpoints.digest_of_prompts(prompts),
        "config": told,
        "reward": secrets.without_login(rewards.name_of(scorer)),
        "shape": list(shape),
        "budget": budget,
        "threads": torch.get_num_threads(),
        "noise_stream": versions()["noise_stream"],
        "schedule": checkpoints.digest_of(times.cpu().numpy().tobytes()),
    }
