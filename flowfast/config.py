"""Configurations: of an engine, of what a request asks for, and of what happened to it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from flowfast import secrets
from flowfast.bounds import MOST_ROWS, Whole, Within, refused
from flowfast.errors import OptionError
from flowfast.flow.gradient import parse_guidance
from flowfast.flow.grid import MOST_STEPS

MOST_NFE = 10_000_000
MOST_SECONDS = 1_000_000
LARGEST = 3.4028234663852886e38
"""Of float32, which rewards are: below its negative lies only -inf, which every prompt has before it begins."""
Rounds = Annotated[int, Within(0, 2**63 - 1)]
LinearTime = Annotated[float, Within(0, 1)]


class Config(BaseModel):
    """Frozen; unknown names are refused. The command line makes its options of the fields, and their help of the first
    paragraph under each."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, use_attribute_docstrings=True)


class EngineConfig(Config):
    """What an engine is: its model and reward, and how it runs them."""

    model: str = "scenes"
    """See `flowfast models`."""
    model_options: dict[str, Any] = {}
    """For a diffusers pipeline: options of `flowfast.from_diffusers` (height, width, steps, dtype, ...)."""
    reward: str = "scenes"
    """See `flowfast rewards`; sums: scenes*0.7+sharpness*0.3."""
    slots: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Prompts in one batch."""
    micro_batch: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Rows in one model call.

    Results are bit-identical at equal micro-batch, threads and machine class."""
    cuda_graphs: bool = True
    """On CUDA: replay rounds from a graph; results are the same without."""
    compile: bool = False
    """Run model and decoder through torch.compile.

    Faster after a first call of up to minutes; last bits may differ."""
    overlap: bool = True
    """With a reward on the host: two batches take turns, the host scores one while the device runs the other.

    At equal micro-batch results are the same without."""
    calibration: str | None = None
    """For method auto: a file of `flowfast calibrate` for this model and reward; default: the model's own."""
    reward_deadline: Annotated[float | None, Within(0, MOST_SECONDS, above=True)] = None
    """Seconds that one call of a reward on the host may take.

    It has at most 64 images (flowfast/rewards/host.py)."""

    @model_validator(mode="before")
    @classmethod
    def _without_secrets(cls, options: Any) -> Any:
        """Names of variables for the secrets in options (flowfast/secrets.py), before anything can show them."""
        if not isinstance(options, dict):
            return options
        found = {**options, "model_options": secrets.sealed_options(options.get("model_options", {}))}
        for name, kind in (("model", "MODEL"), ("reward", "REWARD")):
            if isinstance(found.get(name), str):
                found[name] = secrets.sealed(found[name], kind)
        return found


class QueueConfig(Config):
    """What a long-lived engine takes on."""

    max_budget: Annotated[int, Within(1, MOST_NFE)] = 500
    """The largest budget of a request, in NFE: batches have room for it, so that smaller ones fit into them."""
    max_waiting: Annotated[int | None, Within(0, MOST_ROWS)] = 1024
    """Requests that may wait for a slot; None: any number."""
    memory_share: Annotated[float, Within(0, 1, above=True)] = 0.5
    """Of the device's memory, that all batches may take together; a quarter of that one alone."""
    save_to: str | None = None
    """File of the engine's state, with a journal of its requests beside it; None: nothing is kept."""
    save_seconds: Annotated[float, Within(0, MOST_SECONDS)] = 30.0
    """How often the state is written; it is also written when a request is done."""


class SearchParams(Config):
    """What a request asks for. None: the default of the method, else of the model."""

    method: str = "auto"
    """See `flowfast methods`."""
    method_options: dict[str, Any] = {}
    """The method's own, by name."""
    preset: str | None = None
    """Named settings of path, noise and grid, e.g. paper.

    "paper" (arXiv 2503.19385), "paper-linear"; single options override it."""
    budget: Annotated[int | None, Within(1, MOST_NFE)] = None
    """NFE a prompt: rows through the model."""
    seconds: Annotated[float | None, Within(0, MOST_SECONDS, above=True)] = None
    """Seconds a prompt, instead of a budget."""
    steps: Annotated[int | None, Within(1, MOST_STEPS)] = None
    """Steps from noise to data."""
    interpolant: str | None = None
    """Path of the SDE: linear, vp, ..."""
    diffusion: str | None = None
    """Its noise: zero, sigma:1, square:3, ..."""
    integrator: str | None = None
    """euler-maruyama, exponential, ..."""
    grid: str | None = None
    """Where the steps stand: uniform, paper, ..."""
    tail: Annotated[int | None, Within(0, MOST_STEPS)] = None
    """Noise-free steps that finish a sample."""
    shift: Annotated[float | None, Within(-20, 20)] = None
    """Of grid "shift": its mu, instead of the model's."""
    guidance: Annotated[float | None, Within(0, 1000)] = None
    """Scale of classifier-free guidance; up to 1: off.

    It takes two passes: u = u_null + scale (u - u_null); off, it takes one. What a distilled model takes as an input
    (FLUX dev) is another scale, at one pass: `distilled_guidance` of `flowfast.from_diffusers`; so is what Z-Image's
    pipeline calls guidance, its `guidance` there."""
    guidance_interval: tuple[LinearTime, LinearTime] | None = None
    """Linear t, (low, high), between which guidance acts; None: everywhere.

    Kynkaanniemi et al. 2024, arXiv 2404.07724. Outside, an evaluation takes one pass and costs 1 NFE.
    `guidance="3@0.35:0.8"` says both at once."""
    gradient: str | None = None
    """Gradient guidance, "dps:0.5": the reward's gradient steers every step (flowfast/flow/gradient.py).

    An evaluation then costs a backward pass on top, which NFE do not count. On CUDA some backward passes add in any
    order: last bits may differ from run to run."""
    negative_prompt: str = ""
    """What guidance leads away from."""
    chains: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Particles that go on from step to step."""
    lanes: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Candidates of a chain evaluated at once; same decisions until the budget ends.

    What lanes behind an acceptor cost (`nfe_speculative`) is missing there."""
    seed: Annotated[int, Whole()] = 0
    """Names the noise: any whole number."""
    repeat: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Another sample of the same prompt and seed: another repeat, another noise."""
    first_chain: Annotated[int, Within(0, 2**31)] = 0
    """Number of its first chain, hence their noise.

    A search of eight chains from 8 on is another one than that of chains 0 to 7 of the same seed, prompt and repeat,
    and together they are one of sixteen (without regrouping)."""
    top_k: Annotated[int, Within(1, MOST_ROWS)] = 1
    """How many of the best samples to keep."""
    finalists: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """With a preview decoder: samples to decode in full and score again; default 4, or top_k where that is more.

    They are the best by the preview, and ranked anew. `until` looks at previews."""
    until: Annotated[float | None, Within(-LARGEST, math.inf)] = None
    """Stop a prompt at this reward.

    As soon as a finished sample has it."""
    score_all: bool = False
    """Score every child, also where no decision reads it: for the curve of a reward along t.

    Decisions are the same without."""

    @model_validator(mode="before")
    @classmethod
    def _spell_out(cls, options: Any) -> Any:
        """`guidance` as the text of --guidance. Raises OptionError."""
        if not isinstance(options, dict) or not isinstance(options.get("guidance"), str):
            return options
        found = parse_guidance(options["guidance"])
        twice = [name for name in found if name != "guidance" and options.get(name) is not None]
        if twice:
            raise OptionError(f"guidance {options['guidance']!r} and {twice[0]}: give one of them")
        return {**options, "guidance": None, **found}


class PoolConfig(Config):
    """Prompts of one call that share their budget."""

    pool: bool = False
    """Prompts share their budgets: what one does not need goes to those that do.

    In all it is still the budget times the prompts; one gets at most six times its share."""
    pool_wave: Annotated[int | None, Within(1, MOST_NFE)] = None
    """NFE that a prompt gets of the pool at once; default: of the method's smallest sound search."""


class Picked(Config):
    """What method auto took for a request before it began, and why."""

    budget: Annotated[int, Within(1, MOST_NFE)]
    """In NFE, for which it was taken."""
    method: str
    method_options: dict[str, Any] = {}
    path: dict[str, Any] = {}
    """Options of the path that the calibration named, beside those that the request gave."""
    why: str = ""
    expected: Annotated[float | None, Within(-LARGEST, LARGEST)] = None
    """Mean final reward on the calibration."""
    calibration: str | None = None
    """Its digest; None: there was none."""


class Rerun(Config):
    """What happened to a search that no one asked for, so that a rerun repeats it."""

    splits: tuple[tuple[Rounds, Annotated[int, Within(1, MOST_ROWS)]], ...] = ()
    """(rounds, rows): until the call had run so many rounds a model call had so many rows, then the device ran out of
    memory; its rerun repeats it. After the last of them, and in a replay, it has `micro_batch` rows."""
    cuts: tuple[tuple[Rounds, Rounds, Rounds], ...] = ()
    """(prompt, round, NFE left): what a budget in seconds took away for lack of time; its rerun repeats it."""
    picked: Picked | None = None
    """What method auto took; its rerun takes the same, whatever a calibration says by then."""


class SearchConfig(Rerun, EngineConfig, PoolConfig, SearchParams):
    """Everything that a search depends on beside model weights, reward weights and prompts: the fields of all three in
    one, as keyword arguments, config.yaml and the command line have them."""

    @property
    def params(self) -> SearchParams:
        """What was asked for, alone."""
        return SearchParams.model_construct(**{name: getattr(self, name) for name in SearchParams.model_fields})

    def with_params(self, params: SearchParams) -> SearchConfig:
        """The same engine, asked for something else."""
        return self.model_copy(update={name: getattr(params, name) for name in SearchParams.model_fields})


C = TypeVar("C", bound=Config)


def make(kind: type[C], options: Mapping[str, Any]) -> C:
    """A configuration of this kind; OptionError names what is unknown or wrong, and the valid names."""
    unknown = sorted(set(options) - set(kind.model_fields))
    if unknown:
        name = secrets.without_login(repr(unknown[0]))
        raise OptionError(f"unknown option {name}: choose of {', '.join(sorted(kind.model_fields))}")
    try:
        return kind(**options)
    except ValidationError as error:
        raise refused(error) from None


def make_config(options: Mapping[str, Any]) -> SearchConfig:
    """The whole configuration of a search from options, as `make`."""
    return make(SearchConfig, options)


def options_over(config: Any, options: Mapping[str, Any], reward: Any = None) -> dict[str, Any]:
    """Options of a call, over those of a whole `config` where there is one; `reward` is one of them where it is a
    name. Raises OptionError."""
    whole = {} if config is None else checked_config(config).model_dump()
    return {**whole, **options, **({"reward": reward} if isinstance(reward, str) else {})}


def checked_config(config: Any) -> SearchConfig:
    """A whole configuration that a caller gave. Raises OptionError for anything else."""
    if not isinstance(config, SearchConfig):
        raise OptionError(f"expected config to be a SearchConfig, got {type(config).__name__}; give options by name")
    return config
