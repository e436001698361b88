"""What a program calls: `load` a flow, or make one of a function, `search` with it, `replay` a winner."""

from __future__ import annotations

import contextlib
import gc
import os
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast import rewards, secrets
from flowfast.config import SearchConfig, make_config, options_over
from flowfast.engine import clock
from flowfast.engine.checkpoint import Checkpoint, Held
from flowfast.engine.driver import Driver, OtherBatch
from flowfast.engine.replay import replay
from flowfast.errors import OptionError
from flowfast.files import locked_file
from flowfast.models.answers import defaults_of
from flowfast.models.function import FunctionFlow, flow_from
from flowfast.prompts import check_each, check_prompts
from flowfast.prompts.fields import show
from flowfast.resolve import resolve
from flowfast.surroundings import evaluating, own_ground, plain_defaults
from flowfast.types import Candidate, Flow, Sample, SearchResult

MODELS = {"scenes": "the embedded default: 32 x 32 scenes from prompts with counts, colours, kinds and relations"}


@own_ground()
@plain_defaults()
def load(name: str | Path, **options: Any) -> Flow:
    """A flow by name: "scenes", or the id or folder of a diffusers pipeline, for which options go to
    `flowfast.models.diffusers.from_diffusers`. Raises OptionError for an unknown one, WeightError for damaged
    weights."""
    name, options = secrets.opened(str(name)), secrets.opened_options(options)
    if name == "scenes":
        if options:
            raise OptionError(f"model 'scenes' takes no options, got {', '.join(options)}")
        from flowfast.models.scenes import load_scenes

        return load_scenes()
    if "/" in name or Path(name).is_dir():
        from flowfast.models.diffusers import from_diffusers

        return from_diffusers(name, **options)
    raise OptionError(
        f"unknown model {name!r}: choose one of {', '.join(MODELS)}, the id or folder of a diffusers pipeline "
        "(owner/name), or build your own with flowfast.flow_from"
    )


@own_ground()
def search(
    flow: Flow,
    prompts: Sequence[str],
    *,
    reward: Any = None,
    config: SearchConfig | None = None,
    latents: Tensor | None = None,
    on_round: Callable[[list[Candidate]], None] | None = None,
    on_sample: Callable[[int, Sample], None] | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_seconds: float | None = None,
    **options: Any,
) -> SearchResult:
    """Searches for the best sample of each prompt within a budget.

    prompts: a list of texts, or one. Those that cannot be drawn (empty, no text) and those that model or reward refuse
    are named by their number before anything runs.
    reward: a name, a Reward, or a plain callable (images (N, 3, H, W), prompts) -> N scores, higher is better.
    options: fields of SearchConfig, or a whole `config` (then options override its fields). latents (P, *shape) or
    (P, C, *shape): own initial noise of each prompt (of each chain).
    on_round gets every candidate, on_sample each prompt's result as soon as it is there, on_progress (NFE spent, NFE
    in all).
    checkpoint: a file that holds the search (samples that are done in a second one, named .done behind it), written
    every checkpoint_seconds (30), before a finished prompt is decoded, and at the end; the same call
    with it goes on where it was killed and gives the same samples at equal micro-batch and threads. What was finished
    is decoded and not searched again; on_sample is not told again of prompts that the file holds as done. A
    budget in seconds goes on as the rounds that were planned, without the clock.
    Where a round runs out of the device's memory, the search goes on from before it with half of the micro-batch, which
    the result records (config.micro_batch, config.splits) and later calls with this flow start from. Nothing that was
    reported is taken back; the model saw some rows of such a round for nothing, which no budget counts.
    Raises OptionError, BudgetError, PromptError, RewardError, ModelError: all are FlowfastError.
    """
    started = clock.now()
    told: dict[str, Any] = {"on_round": on_round, "on_sample": on_sample, "on_progress": on_progress}
    _check_call(told, checkpoint, checkpoint_seconds)
    config = make_config(options_over(config, options, reward))
    resolved = resolve(flow, config.params)
    chosen = config.reward if reward is None or isinstance(reward, str) else reward
    scorer = rewards.load(chosen, flow, config.reward_deadline)
    prompts = check_prompts(prompts, empty=not defaults_of(flow).reads_prompts)
    if rewards.on_host(scorer):
        check_each(prompts, scorer.check)
    named = chosen if isinstance(chosen, str) else None
    path = None if checkpoint is None else Path(os.path.realpath(checkpoint))  # a file has one lock, whatever its names
    with evaluating(flow, scorer), contextlib.nullcontext() if path is None else locked_file(path):
        file = None if path is None else Checkpoint(path)
        driver = partial(
            Driver, flow, prompts, scorer, resolved, latents, named, **told, checkpoint=file,
            checkpoint_seconds=checkpoint_seconds, asked_micro_batch=config.micro_batch,
        )  # fmt: skip
        held = None if file is None else file.read(prompts)
        config = config.with_params(resolved.params)
        return _run(driver, _as_it_was(config, file, held) if file and held else config, held, started)


def _check_call(functions: dict[str, Any], checkpoint: Any, seconds: Any) -> None:
    """What a call takes beside options. Raises OptionError."""
    number = isinstance(seconds, Real) and not isinstance(seconds, bool)
    if seconds is not None and not (number and float(seconds) >= 0):
        raise OptionError(f"checkpoint_seconds must be a number, at least 0, got {show(seconds)}")
    for name, function in functions.items():
        if function is not None and not callable(function):
            raise OptionError(f"expected {name} to be a function, got {type(function).__name__}")
    if checkpoint is not None and (not isinstance(checkpoint, str | os.PathLike) or "\0" in str(checkpoint)):
        raise OptionError(f"expected checkpoint to be the path of a file, got {show(checkpoint)}")


def _run(driver: Callable[..., Driver], config: SearchConfig, held: Held | None, started: float) -> SearchResult:
    """The search, with as many drivers as it needs sizes of the micro-batch."""
    while True:
        try:
            return driver(config=config, held=held).run(started)
        except OtherBatch as other:
            config, held = other.config, other.held
            started = started if held else clock.now()  # nothing but the measuring of a round had begun
        gc.collect()  # now that no frame of the failed round is left
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _as_it_was(config: SearchConfig, file: Checkpoint, held: Held) -> SearchConfig:
    """The configuration with what the search that was killed had found out: its micro-batch, what seconds became."""
    facts = held.facts
    file.check_same(facts, {"seconds": config.seconds})
    update: dict[str, Any] = {}
    if config.micro_batch in (None, facts["asked_micro_batch"]):
        update = {"micro_batch": facts["micro_batch"], "splits": tuple(map(tuple, facts["splits"]))}
    if config.seconds is not None:
        update |= {"budget": facts["budget"], "seconds": None, "cuts": tuple(held.cuts)}
    return config.model_copy(update=update)


__all__ = ["MODELS", "FunctionFlow", "flow_from", "load", "replay", "search"]
