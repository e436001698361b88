"""`flowfast generate --ray`: prompts go through a dataset of Ray Data to searchers, and what they find comes back, in
any order, to who writes it."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import pyarrow  # type: ignore[import-untyped]
import ray
import ray.data
from ray.data import ActorPoolStrategy, DataContext

from flowfast import secrets
from flowfast.bounds import Within
from flowfast.config import Config, SearchConfig
from flowfast.errors import OptionError
from flowfast.prompts import Prompt
from flowfast.ray.cluster import LOCAL, as_ours, connected
from flowfast.ray.record import RecordingSearcher

BATCH = 16
"""Prompts of one batch at most, where `slots` do not say otherwise."""


class RayConfig(Config):
    """Where a call runs."""

    address: str = LOCAL
    """local, auto, HOST:PORT or ray://HOST:PORT of a cluster."""
    actors: Annotated[int, Within(1, 100_000)] = 1
    """Processes with the model."""
    gpus: Annotated[float | None, Within(0, 1024)] = None
    """GPUs of an actor, or a fraction of one; 1 where the cluster has any, else 0."""
    threads: Annotated[int, Within(1, 1024)] = 1
    """Threads of PyTorch, and CPUs, of an actor."""
    start_seconds: Annotated[float, Within(1, 86_400)] = 600.0
    """That the actors have to start: the cluster may have to grow, weights to load."""


def found_by(prompts: Sequence[tuple[int, str]], config: SearchConfig, where: RayConfig) -> Iterator[dict[str, Any]]:
    """The row of each prompt (number, text) as soon as its batch is done: `number` and the columns of
    `RecordingSearcher`. Raises OptionError and what loading raises on an actor."""
    check(config)
    rows = [
        {
            "number": number,
            "prompt": str(prompt),
            "entry": json.dumps(prompt.as_entry() if isinstance(prompt, Prompt) else prompt),
        }
        for number, prompt in prompts
    ]
    cpus = max(os.cpu_count() or 1, where.actors * where.threads)
    with connected(where.address, cpus):
        try:
            yield from streamed(rows, config, where)
        except ray.exceptions.GetTimeoutError:
            there = ", ".join(f"{count:g} {name}" for name, count in resources().items()) or "nothing"
            raise OptionError(
                f"{where.actors} actors did not start within {where.start_seconds:g} s: the cluster has {there}; an "
                "actor takes a CPU and --gpus of a GPU, and loads the model; `ray status` says what waits, their logs "
                "there whether they die"
            ) from None
        except ray.exceptions.RayError as error:
            raise as_ours(error) from None


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster."""
    return {name: count for name, count in ray.cluster_resources().items() if name in ("CPU", "GPU")}


def check(config: SearchConfig) -> None:
    """Raises OptionError for what one process alone can do."""
    if config.seconds is not None or config.budget is None:
        raise OptionError("--ray needs a budget in NFE (--budget): seconds are measured in one process")
    if config.cuts or config.splits:
        raise OptionError("this config.yaml repeats what time or memory did to a call: run it without --ray")


def streamed(rows: list[dict[str, Any]], config: SearchConfig, where: RayConfig) -> Iterator[dict[str, Any]]:
    size = min(config.slots or BATCH, math.ceil(len(rows) / where.actors))
    context = DataContext.get_current()
    context.enable_progress_bars, context.wait_for_min_actors_s = False, math.ceil(where.start_seconds)
    gpus = where.gpus if where.gpus is not None else float(resources().get("GPU", 0) > 0)
    blocks = [pyarrow.Table.from_pylist(rows[start : start + size]) for start in range(0, len(rows), size)]
    dataset = ray.data.from_arrow(blocks).map_batches(
        RecordingSearcher,
        fn_constructor_kwargs=dict(
            config=config.model_dump(),
            threads=where.threads,
            folder=os.getcwd(),
            secrets=secrets.named_in([config.model, config.reward, config.model_options]),
        ),
        batch_size=size,
        num_cpus=where.threads,
        num_gpus=gpus,
        compute=ActorPoolStrategy(size=min(where.actors, len(blocks)), max_tasks_in_flight_per_actor=2),
    )
    for table in dataset.iter_batches(batch_size=None, batch_format="pyarrow", prefetch_batches=0):
        yield from table.to_pylist()
