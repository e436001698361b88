"""The public door: `load` a flow, `search` with it, `replay` a winner."""

from __future__ import annotations

import contextlib
import gc
import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowfast import answers, clock, rewards, secrets
from flowfast.checkpoint import Checkpoint, Held
from flowfast.config import SearchConfig, make_config
from flowfast.driver import Driver, OtherBatch
from flowfast.errors import FlowfastError, OptionError
from flowfast.fields import show
from flowfast.files import locked_file
from flowfast.ops.noise import noise_key
from flowfast.prompts import check_each, check_prompts
from flowfast.searcher.steered import evaluate, frozen
from flowfast.settings import Setup, real_latents
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


class FunctionFlow:
    """A plain velocity function as a Flow."""

    def __init__(
        self, velocity: Callable, shape: Sequence[int], decode: Callable | None, encode: Callable | None, **facts: Any
    ):
        self.shape = answers.latent_shape(shape)
        self.interpolant: str = facts["interpolant"]
        self.t_finish: float = facts["t_finish"]
        self.guidance: float = facts["guidance"]
        self.preview: Callable[[Tensor], Tensor] | None = facts["preview"]
        self._velocity, self._decode, self._encode = velocity, decode, encode

    @property
    def reads_prompts(self) -> bool:
        """Without an own encode any prompt will do, the empty one too: it only names the noise."""
        return self._encode is not None

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._encode(prompts) if self._encode else answers.nothing(len(prompts))

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return answers.velocity_of(self._velocity(x_t, t, cond), x_t)

    def decode(self, x0: Tensor) -> Tensor:
        return answers.images_of(self._decode(x0), x0) if self._decode else x0


def flow_from(
    velocity: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    shape: Sequence[int],
    decode: Callable[[Tensor], Tensor] | None = None,
    encode: Callable[[list[str]], dict[str, Tensor]] | None = None,
    interpolant: str = "linear",
    t_finish: float = 0.1,
    guidance: float = 1.0,
    preview: Callable[[Tensor], Tensor] | None = None,
) -> Flow:
    """An own model: velocity(x_t (N, *shape), t (N,), cond) -> u_t (N, *shape), t = 1 noise.

    decode turns x0 into what the reward sees (default: x0 itself); encode turns prompts into tensors (N, ...). What
    else they may answer: flowfast/answers.py.
    t_finish is the linear-equivalent time at or below which a posterior mean counts as a finished sample. preview: a
    cheaper decode for the search to look through; its finalists are decoded in full and scored again.
    """
    for name, part in {"velocity": velocity, "decode": decode, "encode": encode, "preview": preview}.items():
        if not callable(part) and (name == "velocity" or part is not None):
            raise OptionError(f"expected {name} to be a function, got {type(part).__name__}")
    facts = {"interpolant": interpolant, "t_finish": t_finish, "guidance": guidance, "preview": preview}
    return FunctionFlow(velocity, shape, decode, encode, **facts)


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
    seconds = checkpoint_seconds
    if seconds is not None and not (isinstance(seconds, Real) and not isinstance(seconds, bool) and seconds >= 0):
        raise OptionError(f"checkpoint_seconds must be a number, at least 0, got {show(seconds)}")
    for name, function in {"on_round": on_round, "on_sample": on_sample, "on_progress": on_progress}.items():
        if function is not None and not callable(function):
            raise OptionError(f"expected {name} to be a function, got {type(function).__name__}")
    if checkpoint is not None and (not isinstance(checkpoint, str | os.PathLike) or "\0" in str(checkpoint)):
        raise OptionError(f"expected checkpoint to be the path of a file, got {show(checkpoint)}")
    if config is not None:
        options = {**_config(config).model_dump(), **options}
    if isinstance(reward, str):
        options["reward"] = reward
    setup = Setup(flow, make_config(options))
    chosen = setup.config.reward if reward is None or isinstance(reward, str) else reward
    scorer = rewards.load(chosen, flow, setup.config.reward_deadline)
    prompts = check_prompts(prompts, empty=isinstance(flow, FunctionFlow) and not flow.reads_prompts)
    if rewards.on_host(scorer):
        check_each(prompts, scorer.check)
    named = chosen if isinstance(chosen, str) else None
    path = None if checkpoint is None else Path(os.path.realpath(checkpoint))  # a file has one lock, whatever its names
    held, file = None, None
    with evaluating(flow, scorer), contextlib.nullcontext() if path is None else locked_file(path):
        if path is not None:
            file = Checkpoint(path)
            held = file.read(prompts)
            setup.config = _as_it_was(setup.config, file, held) if held else setup.config
        while True:
            try:
                return Driver(
                    flow, prompts, scorer, setup, latents, named, on_round, on_sample, on_progress, file,
                    checkpoint_seconds, held,
                ).run(started)  # fmt: skip
            except OtherBatch as other:
                setup.config, held = other.config, other.held
                started = started if held else clock.now()  # nothing but the measuring of a round had begun
            gc.collect()  # now that no frame of the failed round is left
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def _config(config: Any) -> SearchConfig:
    if not isinstance(config, SearchConfig):
        raise OptionError(f"expected config to be a SearchConfig, got {type(config).__name__}; give options by name")
    return config


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


@own_ground()
def replay(
    flow: Flow, sample: Sample, config: SearchConfig, latents: Tensor | None = None, reward: Any = None
) -> list[tuple[float, Tensor]]:
    """Walks a winner's path again from its addresses alone: (linear t, image (3, H, W)) of every posterior mean on
    the way.

    The last one is bit-identical to sample.image at equal micro-batch, threads and machine class, where the kernels of
    model and reward give a row the same bits wherever in its micro-batch it stands; with `gradient` those of the
    backward pass, too, of which MKL's float32 product of 9 columns without AVX-512 is one that does not (`scenes`).
    latents (*shape): the initial noise, where it was given. reward: the one that steered (`gradient`); default: the
    configuration's.
    """
    setup, own, flow = Setup(flow, _config(config)), flow, answers.CheckedFlow(flow)
    M, schedule, winner = config.micro_batch or 1, setup.schedule, sample.winner
    shape, table = [M, *flow.shape], schedule.table.float()
    conds = [_rows(flow.encode([text]), M) for text in (sample.prompt, config.negative_prompt)[: setup.passes]]
    device = next(iter(conds[0].values())).device
    guidance = torch.full((M,), setup.guidance, dtype=torch.float32, device=device) if setup.passes == 2 else None
    x, u, x0, grad = (torch.zeros(M, math.prod(flow.shape), dtype=torch.float32, device=device) for _ in range(4))
    latents = None if latents is None else real_latents(latents)
    if latents is not None and tuple(latents.shape) != tuple(flow.shape):
        raise OptionError(f"latents must have the shape of one latent, {tuple(flow.shape)}, got {tuple(latents.shape)}")
    if [row for _, row, _ in winner.path] != list(range(min(len(winner.path), schedule.rows))) or not winner.path:
        raise OptionError(
            f"the sample's path of {len(winner.path)} steps is none of this configuration's {schedule.rows} rows: give "
            "the config of the result that it came with"
        )
    table, time, parent = table.to(device), schedule.time.float().to(device), torch.arange(M, device=device)
    pictures = []
    scorer = None if config.gradient is None else rewards.load(config.reward if reward is None else reward, flow)
    with evaluating(own, scorer), frozen(*() if scorer is None else (flow, scorer)):
        asked = {} if scorer is None else _rows(_asked(scorer, sample.prompt, device), M)
        for chain, row, candidate in winner.path:
            rows = torch.full((M,), row, device=device)
            if row == 0 and latents is not None:
                x.copy_(latents.reshape(1, -1).expand_as(x))
            else:
                address = (torch.full((M,), value, device=device) for value in (winner.key, candidate, chain))
                torch.ops.flowfast.branch_step(x, u, parent, rows, *address, table, x, None, grad)
            t, linear_t = time[rows], schedule.linear_time[row].float().expand(M).to(device)
            if scorer is not None:
                point = (x.view(shape), t, linear_t, conds, asked, guidance, rows, table)
                grad = evaluate(flow, rewards.graded(scorer), *point, u, x0).grad
            else:
                velocity, *null = (flow.velocity(x.view(shape), t, cond).reshape(M, -1) for cond in conds)
                uncond = null[0] if null else None
                torch.ops.flowfast.posterior_mean(x, velocity, uncond, guidance, rows, table, u, x0)
            image = flow.decode(x0[:1].view([1, *flow.shape]))[0].float().cpu()
            pictures.append((float(schedule.linear_time[row]), image.clone()))  # decode may hand back x0 itself
    return pictures


def _rows(cond: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """One prompt's conditions, `count` times."""
    return {name: value.expand(count, *value.shape[1:]).contiguous() for name, value in cond.items()}


def _asked(reward: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
    """What a reward that steers knows of one prompt."""
    rewards.check_gradient(reward)
    reward.to(device)
    return {name: value.to(device) for name, value in reward.encode([prompt]).items()}


__all__ = ["FlowfastError", "Setup", "flow_from", "load", "noise_key", "replay", "search"]
