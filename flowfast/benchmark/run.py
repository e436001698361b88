"""Requests through a long-lived engine, and what they took."""

from __future__ import annotations

import gc
import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from flowfast import rewards
from flowfast.benchmark.pipeline import PipelineLoop
from flowfast.config import SearchConfig
from flowfast.engine import clock
from flowfast.engine.engine import Engine
from flowfast.engine.request import Failed, Finished, Found
from flowfast.errors import OptionError
from flowfast.prompts import check_each
from flowfast.types import Flow

Advance = Callable[[int, int, str], None]
"""Told (requests done, of, what runs)."""


@dataclass(frozen=True)
class Served:
    """What one request took, in seconds from its arrival; its prompt is encoded in them."""

    latency: float
    first_sample: float | None
    """Until it had a finished sample, which it may better; None: it was told of none before its end."""
    nfe: int
    images: int


@dataclass
class Run:
    """What some requests took together."""

    served: list[Served] = field(default_factory=list)
    seconds: float = 0.0
    rows: int = 0
    """That the model saw, padding included."""
    parts: dict[str, float] = field(default_factory=dict)
    """Seconds in model, decoder, reward and search: where a CUDA graph has decoder and reward, the model's."""


@dataclass(frozen=True)
class Workload:
    """What is asked for, and the model and the reward that are asked."""

    config: SearchConfig
    prompts: tuple[str, ...]
    """The list begins again where there are more requests."""
    flow: Flow
    scorer: Any

    def check(self) -> None:
        """Raises PromptError for a prompt that model or reward cannot take, before anything runs."""
        on_host = rewards.on_host(self.scorer)
        check_each(self.prompts, lambda text: self.flow.encode([text]))
        check_each(self.prompts, self.scorer.check if on_host else lambda text: self.scorer.encode([text]))

    def requests(self, count: int) -> list[dict[str, Any]]:
        """Arguments of `Engine.add_request`. Each has a seed of its own, the same in every run."""
        params, seed = self.config.params.model_dump(exclude={"seed"}), self.config.seed
        prompts = itertools.islice(itertools.cycle(self.prompts), count)
        return [{**params, "prompt": prompt, "seed": seed + at} for at, prompt in enumerate(prompts)]

    @contextmanager
    def engine(self, slots: int | None, micro_batch: int | None) -> Iterator[Engine]:
        """An engine whose batches have room for this budget and no more."""
        config = self.config
        options = {name: getattr(config, name) for name in ("cuda_graphs", "compile", "overlap", "reward_deadline")}
        if slots is not None:
            options["slots"] = slots
        with Engine(
            self.flow, {config.reward: self.scorer}, micro_batch=micro_batch, max_budget=config.budget,
            max_waiting=None, **options,
        ) as engine:  # fmt: skip
            yield engine


def serve(
    engine: Engine, requests: Sequence[dict[str, Any]], at_once: int, run: Run, done: Callable[[], None] = lambda: None
) -> None:
    """Runs requests to their end and adds what they took to `run`: so many at once, the next one comes as one ends.
    done: told after each. Raises FlowfastError where one fails."""
    core, waiting, under_way, first = engine.core, deque(requests), dict[str, float](), dict[str, float]()
    rows, before, start = core.rows_seen, engine.loaded.clock.read(), clock.now()
    while waiting or under_way:
        while waiting and len(under_way) < at_once:
            arrived = clock.now()
            under_way[engine.add_request(**waiting.popleft())] = arrived
        for event in engine.step():
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Found):
                first.setdefault(event.id, clock.now() - under_way[event.id])
            if isinstance(event, Finished):
                seconds = clock.now() - under_way.pop(event.id)
                sample = event.sample
                run.served.append(Served(seconds, first.pop(event.id, None), sample.nfe, len(sample.top)))
                done()
    after = engine.loaded.clock.read()  # waits for the device
    run.seconds += clock.now() - start
    run.rows += core.rows_seen - rows
    for part, seconds in after.items():
        run.parts[part] = run.parts.get(part, 0.0) + seconds - before[part]


@dataclass(frozen=True)
class Latency:
    """Requests one after the other, and what the engine ran them with."""

    run: Run
    baseline: list[float]
    """Seconds of the pipeline's own loop beside each request; []: it was not asked for."""
    images: int
    """That it drew of each prompt."""
    slots: int
    micro_batch: int


def latency(work: Workload, count: int, warmup: int, loop: PipelineLoop | None, advance: Advance) -> Latency:
    """One request at a time. Where there is a `loop`, each takes turns with it, and every other turn it goes first."""
    of = warmup + count
    with work.engine(work.config.slots, work.config.micro_batch) as engine:

        def turns(requests: list[dict[str, Any]], before: int, text: str) -> tuple[Run, list[float]]:
            run, baseline = Run(), list[float]()
            for at, request in enumerate(requests):
                advance(before + at, of, text)
                if at % 2 == 0:
                    serve(engine, [request], 1, run)
                if loop is not None:
                    baseline.append(loop.seconds(request, sizes_of(engine)[1]))
                if at % 2:
                    serve(engine, [request], 1, run)
            return run, baseline

        turns(work.requests(warmup), 0, "warming up")
        run, baseline = turns(work.requests(count), warmup, "requests")
        return Latency(run, baseline, loop.images if loop else 0, *sizes_of(engine))


@dataclass(frozen=True)
class Setting:
    """Many requests with one number of slots and one micro-batch."""

    slots: int
    micro_batch: int
    run: Run
    slots_held: int
    """Fewer where no more fit into memory."""
    micro_batch_held: int
    rates: tuple[float, ...] = ()
    """Requests a second in each turn."""


def throughput(
    work: Workload, settings: Sequence[tuple[int, int]], count: int, warmup: int | None, turns: int, advance: Advance
) -> list[Setting]:
    """The same requests with each (slots, micro-batch), always as many under way as there are slots, so that none waits
    for one. The settings take turns, each turn has a part of the requests, and every other one goes backwards: a
    machine that becomes slower meanwhile does so for all. warmup: requests before, in each turn of a setting; None: as
    many as it has slots. Raises OptionError: fewer requests than turns."""
    if count < turns:
        raise OptionError(f"expected at least a request a turn, got {count} in {turns} turns: raise --num-prompts")
    requests, of, before = work.requests(count), len(settings) * count, 0
    runs, rates = [Run() for _ in settings], [list[float]() for _ in settings]
    held = list(settings)
    for turn in range(turns):
        part = requests[turn * count // turns : (turn + 1) * count // turns]
        for at in range(len(settings))[:: -1 if turn % 2 else 1]:
            (slots, micro_batch), run, seconds = settings[at], runs[at], runs[at].seconds
            text = f"turn {turn + 1}: {slots} slots, micro-batch {micro_batch}"
            with work.engine(slots, micro_batch) as engine:
                advance(before, of, f"{text}: warming up")
                serve(engine, work.requests(slots if warmup is None else warmup), slots, Run())
                serve(engine, part, slots, run, partial(tell, advance, itertools.count(before + 1), of, text))
                held[at] = least(held[at], sizes_of(engine))
            del engine
            gc.collect()  # an engine's parts know each other: without it the next one has its memory beside this one's
            before += len(part)
            rates[at].append(len(part) / (run.seconds - seconds))
    return [Setting(*settings[at], runs[at], *held[at], tuple(rates[at])) for at in range(len(settings))]


def tell(advance: Advance, ended: Iterator[int], of: int, text: str) -> None:
    advance(next(ended), of, text)


def least(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    return min(one[0], other[0]), min(one[1], other[1])


def sizes_of(engine: Engine) -> tuple[int, int]:
    """Slots of all batches that the engine has, and rows of their model calls: on a CPU as few as a request fills by
    itself where no micro-batch is given, and anywhere fewer than was asked for where memory ran out."""
    batches = engine.core.scheduler.batches
    return sum(len(batch.jobs) for batch in batches), max(batch.runner.micro_batch for batch in batches)
