"""The public engine: long-lived, for searches that come and go."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from flowfast import rewards
from flowfast.config import MOST_SECONDS, EngineConfig, QueueConfig, SearchParams, make
from flowfast.engine import clock
from flowfast.engine.core import EngineCore
from flowfast.engine.journal import Known
from flowfast.engine.loaded import Loaded
from flowfast.engine.maker import BATCH_CAPS, LiveMaker
from flowfast.engine.prepare import MOST_ALONE, Preparer
from flowfast.engine.request import Event, Failed, Finished, Job, Request
from flowfast.engine.snapshot import Found, Kept, read, write_aside
from flowfast.errors import OptionError, OutputError
from flowfast.models.answers import defaults_of
from flowfast.models.named import load
from flowfast.prompts import check_prompts
from flowfast.prompts.fields import show
from flowfast.resolve import real_latents
from flowfast.rounds.steered import frozen
from flowfast.surroundings import modules_of, own_ground
from flowfast.types import Flow

SLOTS = 16


class EngineOptions(EngineConfig, QueueConfig):
    """All that an engine is made of."""

    @property
    def same(self) -> dict[str, Any]:
        """What must be equal where a state is put back."""
        return {"micro_batch": self.micro_batch, "max_budget": self.max_budget}


class Engine:
    """Searches that come and go; those that fit share model calls, and none sees that it has neighbours.

        engine = flowfast.Engine("scenes", reward="scenes", slots=16, micro_batch=16)
        engine.add_request("two red circles", method="svdd", budget=200, seed=0)
        for event in engine.stream():
            if isinstance(event, flowfast.Finished):
                event.sample.image

    A request has the same bits alone and among any others, at one micro-batch; a deadline or a lack of memory may
    change them, and `Finished.rerun` says what happened. One thread's own: `flowfast.AsyncEngine` is for several.

    Args:
        model: a name, as `flowfast.load` takes it, or a flow.
        reward: one, or several by name ({"name": reward}) or in a list: names, modules or callables, as
            `flowfast.search` takes them. The first is that of requests that name none.
        options: fields of EngineConfig and QueueConfig: slots (16 prompts of a kind at once), micro_batch (by default
            that of `default_micro_batch`), max_budget, max_waiting, save_to, ...

    Raises:
        OptionError, WeightError: what is asked for does not exist, or does not go together.
    """

    def __init__(self, model: str | Flow = "scenes", reward: Any = "scenes", **options: Any):
        self.options = make(EngineOptions, options)
        flow = load(model, **self.options.model_options) if isinstance(model, str) else model
        named = rewards_by_name(reward)
        scorers = {name: rewards.load(each, flow, self.options.reward_deadline) for name, each in named.items()}
        self.first_reward = next(iter(named))
        self.loaded = Loaded(flow, scorers, cuda_graphs=self.options.cuda_graphs, compile=self.options.compile)
        self.reads_prompts = defaults_of(flow).reads_prompts
        self._modules = [module for part in (flow, *scorers.values()) for module in modules_of(part)]
        self._trained = [each for module in self._modules for each in module.modules() if each.training]
        for module in self._trained:
            module.training = False
        self._jobs: dict[str, Job] = {}
        self._steered: set[str] = set()  # those that follow a gradient
        self._numbers = itertools.count()
        self._told: list[int] = []  # numbers of those whose last event was told
        self._draining = False
        self.kept: Kept | None = None
        self._begin()
        if self.options.save_to is not None:
            self._keep(Kept(Path(self.options.save_to), Known(), anew=True))

    def _begin(self) -> None:
        """An empty core for the model as it is now."""
        options, loaded = self.options, self.loaded
        slots, share = options.slots or SLOTS, options.memory_share
        maker = LiveMaker(loaded, slots=slots, overlap=options.overlap, share=share)
        self.core = EngineCore(maker, micro_batch=options.micro_batch or 1, most_waiting=options.max_waiting)
        self._sized = options.micro_batch is not None
        self.core.save = None if self.kept is None else self._save
        self.preparer = Preparer(
            loaded, options.max_budget, lone=options.micro_batch is None, calibration=options.calibration
        )
        self._fingerprint = fingerprint(self._modules)

    # ---- requests ----

    def add_request(
        self, prompt: str, *, id: str | None = None, reward: str | None = None, latents: Tensor | None = None,
        priority: int = 0, deadline: float | None = None, candidates: bool = False, **params: Any,
    ) -> str:  # fmt: skip
        """Takes a search on, and answers its id, by which its events are known.

        id: your own, of no request that runs. reward: one of the engine's. latents: own initial noise. priority: lower
        is earlier. deadline: seconds to its end. candidates: `Progress` tells what each round evaluated. params: fields
        of SearchParams; budget is needed. Raises OptionError, PromptError, BudgetError, ...: nothing was taken on.
        Where the queue is full or the deadline cannot be met, its event is `Failed`.
        """
        if self._draining:
            raise OptionError("this engine takes no more requests: it is being drained")
        (text,) = check_prompts([prompt], empty=not self.reads_prompts)
        number = next(self._numbers)
        while id is None and str(number) in self._jobs:  # a caller chose it
            number = next(self._numbers)
        name = str(number) if id is None else id
        if not isinstance(name, str) or name in self._jobs:
            raise OptionError(f"expected an id that no other request has, got {show(id)}: leave it out, or change it")
        request = Request(
            id=name, prompt=text, params=make(SearchParams, params), reward=reward or self.first_reward,
            latents=None if latents is None else real_latents(latents), priority=whole(priority, "priority"),
            deadline=None if deadline is None else positive(deadline, "deadline"), candidates=bool(candidates),
        )  # fmt: skip
        self._add(request, number)
        return name

    @own_ground()
    def _add(self, request: Request, number: int) -> None:
        self._check_model()
        scorer = self.loaded.reward(request.reward)
        if rewards.on_host(scorer):
            scorer.check(request.prompt)
        job = self._job(request, number)
        if self.kept is not None:
            try:
                self.kept.add(job.request, number)
            except OutputError:
                del self._jobs[request.id]
                raise
        if request.params.gradient is not None:
            self._steered.add(request.id)
        self.core.add(job)

    def _job(self, request: Request, number: int) -> Job:
        job = self._jobs[request.id] = self.preparer.job(request, number, clock.now())
        if not self._sized:  # now that the model has said on which device it runs
            rows = min(default_micro_batch(self.loaded), BATCH_CAPS.get(self.loaded.original, 32))
            self.core.micro_batch = self.core.last_micro_batch = rows
            self._sized = True
        return job

    def abort(self, id: str) -> bool:
        """Takes a request back: no model call that begins now sees it. False where none of this id runs or waits."""
        job = self._jobs.get(id)
        if job is None:
            return False
        self.core.abort(job)
        if self.kept is not None:
            self.kept.end([job.number])
        return True

    # ---- steps ----

    @property
    def busy(self) -> bool:
        """Is there anything to do or to tell?"""
        return self.core.busy

    @own_ground()
    def step(self) -> list[Event]:
        """One round of one batch; what happened since the last step, in order. Who calls again has heard of it: a
        request whose last event was told is not run again by an engine that is restored."""
        if self.kept is not None and self._told:
            self.kept.end(self._told)
        self._told = []
        with frozen(*(self.loaded.original, *self.loaded.scorers.values()) if self._steered else ()):
            events = self.core.step()
        for event in events:
            if isinstance(event, Finished | Failed):
                self._told.append(self._jobs.pop(event.id).number)
                self._steered.discard(event.id)
        if self.kept is not None and clock.now() - self.kept.saved >= self.options.save_seconds:
            self._save()
        self.core.scheduler.free_idle(clock.now())
        return events

    def stream(self) -> Iterator[Event]:
        """Events of all requests until none is left; requests may be added on the way."""
        while self.busy:
            yield from self.step()

    def drain(self, seconds: float | None = None) -> list[Event]:
        """Takes no more requests and finishes those that it has; what is not done after so many seconds is aborted."""
        self.stop_admitting()
        end, events = None if seconds is None else clock.now() + seconds, list[Event]()
        while self.busy:
            if end is not None and clock.now() >= end:
                self.abort_all()
                end = None
            events += self.step()
        return events

    def stop_admitting(self) -> None:
        """From here on no request is taken on."""
        self._draining = True

    def abort_all(self) -> None:
        for id in list(self._jobs):
            self.abort(id)

    def close(self) -> None:
        """Lets go of threads and files, and puts modules back into training mode where they were. What had not ended is
        still in `save_to`."""
        self.loaded.close()
        for module in self._trained:
            module.training = True
        self._trained = []
        if self.kept is not None:
            self.kept.end(self._told)
            self.kept.close()
            self.kept = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- the model ----

    def _check_model(self) -> None:
        if fingerprint(self._modules) != self._fingerprint:
            raise OptionError(
                "the model or a reward has changed under the engine (weights, device or adapters): wait until no "
                "request runs, and call engine.reload()"
            )

    def reload(self) -> None:
        """Takes a changed model or reward over, and requests again after `drain`. Raises OptionError while some run."""
        if self._jobs or self.busy:
            raise OptionError(f"{len(self._jobs)} requests still run on the old model: drain first, then reload()")
        self._draining = False
        self._begin()

    # ---- a state that lasts ----

    def snapshot(self, path: str | Path) -> None:
        """Writes what runs and waits to `path`, and a journal of the requests beside it, for `restore`."""
        place = Path(path)
        if self.kept is not None and place.resolve() == self.kept.path.resolve():
            return self._save()
        write_aside(place, self.core, self._jobs.values(), self.options.same)

    @classmethod
    def restore(cls, path: str | Path, model: str | Flow = "scenes", reward: Any = "scenes", **options: Any) -> Engine:
        """An engine that goes on where the one of this snapshot, or that was saving to it, stood: with the same model,
        rewards (by name) and options its requests find what they would have found. Deadlines begin anew. It goes on
        saving there. Raises OptionError where a file is damaged, saying what is intact, or is of another engine."""
        found = read(Path(path))
        engine = cls(model, reward, **{**options, "save_to": None})
        try:
            engine.options = make(EngineOptions, {**options, "save_to": str(path)})
            engine._go_on(found)
        except BaseException:
            engine.close()
            raise
        return engine

    @own_ground()
    def _go_on(self, found: Found) -> None:
        self._numbers = itertools.count(found.known.next)
        jobs = found.jobs(self._job)
        self._steered = {id for id, job in self._jobs.items() if job.request.params.gradient is not None}
        running = found.put_back(self.core, jobs, self.options.same)
        for number, job in jobs.items():
            if number not in running:
                self.core.note(job)
                self.core.scheduler.add(job)
        self._keep(Kept(found.path, found.known))

    def _keep(self, kept: Kept) -> None:
        self.kept, self.core.save = kept, self._save
        self._save()

    def _save(self) -> None:
        assert self.kept
        self.kept.save(self.core, self.options.same)


def fingerprint(modules: list[nn.Module]) -> list[tuple[int, int, str]]:
    """By which a change of weights, devices or adapters shows."""
    of_modules = (module.parameters() for module in modules)
    return [(each.data_ptr(), each._version, str(each.device)) for of in of_modules for each in of]


def rewards_by_name(reward: Any) -> dict[str, Any]:
    """{"name": reward} of one reward or several. Raises OptionError."""
    if isinstance(reward, Mapping):
        found = dict(reward)
    else:
        several = reward if isinstance(reward, Sequence) and not isinstance(reward, str) else [reward]
        found = {each if isinstance(each, str) else rewards.name_of(rewards.load(each)): each for each in several}
        if len(found) < len(several):
            raise OptionError('two rewards have one name: give them as {"name": reward, ...}')
    if not found or not all(isinstance(name, str) for name in found):
        raise OptionError(f"expected a reward, or several by name, got {show(reward)}")
    return found


def default_micro_batch(loaded: Loaded) -> int:
    """Rows of a model call where none are given: by device, latent and request alone, for results depend on it. On a
    CPU 8, or as few as the request fills by itself (`Job.rows`); on a GPU as many as have 2^20 numbers together (4 at
    1024 x 1024 of FLUX), from 1 to 32."""
    numel = math.prod(map(int, loaded.flow.shape))
    if loaded.device.type == "cpu":
        return MOST_ALONE
    return max(1, min(32, 1 << (2**20 // numel).bit_length() - 1)) if numel < 2**20 else 1


def whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or abs(value) > 2**31:
        raise OptionError(f"expected {name} to be a whole number, got {show(value)}")
    return value


def positive(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= MOST_SECONDS:
        raise OptionError(f"expected {name} to be positive seconds, at most {MOST_SECONDS}, got {show(value)}")
    return float(value)
