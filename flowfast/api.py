"""What a program calls: `load` a flow, or make one of a function, `search` with it, `replay` a winner."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

from torch import Tensor

from flowfast import rewards
from flowfast.calibration.auto import open_still, settled_config
from flowfast.config import Picked, SearchConfig, make_config, options_over
from flowfast.engine import clock
from flowfast.engine.call import Call, Told
from flowfast.engine.checkpoint import Checkpoint, Held
from flowfast.engine.replay import replay
from flowfast.errors import OptionError
from flowfast.files import locked_file
from flowfast.models.answers import defaults_of
from flowfast.models.function import FunctionFlow, flow_from
from flowfast.models.named import MODELS, load
from flowfast.pool.call import PoolCall
from flowfast.prompts import check_each, check_prompts
from flowfast.prompts.fields import show
from flowfast.resolve import resolve
from flowfast.surroundings import evaluating, own_ground
from flowfast.types import Candidate, Flow, Sample, SearchResult


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

    Args:
        flow: the model: `load`, `flow_from`, `from_diffusers`, or an own one.
        prompts: a list of texts, or one. Those that cannot be drawn (empty, no text) and those that model or reward
            refuse are named by their number before anything runs.
        reward: a name, a Reward, or a plain callable (images (N, 3, H, W), prompts) -> N scores, higher is better.
        config: a whole configuration, over which options have precedence.
        latents: (P, *shape) or (P, C, *shape): own initial noise of each prompt (of each chain).
        on_round: gets every candidate. on_sample: each prompt's result as soon as it is there. on_progress: (NFE spent,
            NFE in all).
        checkpoint: a file that holds the search, written every checkpoint_seconds (30), before a finished prompt is
            decoded, and at the end; samples that are done are in a second one, named .done behind it. The same call
            goes on where it was killed and gives the same samples at equal micro-batch and threads: what was finished
            is decoded and not searched again, and on_sample is not told again of prompts that the file holds as done.
            A budget in seconds goes on as the rounds that were planned, without the clock.
        options: fields of SearchConfig.

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
        held = None if file is None else file.read(prompts)
        whole = settled_config(flow, scorer, _as_it_was(config, file, held) if file and held else config)
        resolved = resolved if whole.params == config.params else resolve(flow, whole.params)
        if not open_still(whole):
            whole = whole.with_params(resolved.params)
        return (PoolCall if whole.pool else Call)(
            flow, prompts, scorer, resolved, latents, named, Told(**told), whole, checkpoint=file,
            checkpoint_seconds=checkpoint_seconds, before=held, asked_micro_batch=config.micro_batch, started=started,
        ).run()  # fmt: skip


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


def _as_it_was(config: SearchConfig, file: Checkpoint, held: Held) -> SearchConfig:
    """The configuration with what the search that was killed had found out: its micro-batch, what seconds became."""
    facts = held.facts
    file.check_same(facts, {"seconds": config.seconds})
    update: dict[str, Any] = {}
    if config.micro_batch in (None, facts["asked_micro_batch"]):
        update = {"micro_batch": facts["micro_batch"], "splits": tuple(map(tuple, facts["splits"]))}
    if facts.get("picked") is not None:
        update["picked"] = Picked(**facts["picked"])
    if config.seconds is not None:
        update |= {"budget": facts["budget"], "seconds": None, "cuts": tuple(held.cuts)}
    return config.model_copy(update=update)


__all__ = ["MODELS", "FunctionFlow", "flow_from", "load", "replay", "search"]
