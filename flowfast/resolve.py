"""What a configuration means for one flow: its schedule, method, passes and plan, and the batch of slots that runs
it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowfast.config import SearchConfig
from flowfast.errors import OptionError
from flowfast.flow import ScheduleSpec
from flowfast.flow.gradient import parse_gradient
from flowfast.flow.schedule import Schedule
from flowfast.memory import size_of
from flowfast.methods import make_method
from flowfast.methods.base import PAPER, Method
from flowfast.methods.plan import Plan
from flowfast.models.answers import asked, defaults_of, latent_shape, unusual
from flowfast.prompts.fields import show
from flowfast.rounds.batch import Search
from flowfast.rounds.steered import Steered
from flowfast.types import PATH_OPTIONS, Conditions, Flow, FlowDefaults

FALLBACK: dict[str, Any] = {
    "interpolant": "linear",
    "diffusion": None,
    "integrator": "coefficient-preserving:0.5",
    "grid": "uniform",
    "steps": 10,
    "tail": None,
    "shift": None,
}
PRESETS: dict[str, dict[str, Any]] = {
    "paper": PAPER,
    "paper-linear": {**PAPER, "interpolant": "linear"},
}


class Setup:
    """What a configuration means for one flow: schedule, method, passes, plan."""

    def __init__(self, flow: Flow, config: SearchConfig):
        preferred = defaults_of(flow).method_defaults.get(config.method, {})
        self.method: Method = make_method(config.method, {**preferred, **config.method_options})
        latent_shape(asked("the model's shape", lambda: flow.shape))
        path = resolve_path(flow, config, self.method)
        self.guidance = _guidance(flow, config)
        finalists = _finalists(flow, config)
        self.config = config.model_copy(update={**path, "guidance": self.guidance, "finalists": finalists})
        self.asked_micro_batch = config.micro_batch
        strength = 0.0 if config.gradient is None else parse_gradient(config.gradient).strength
        self.t_finish = _number(flow.t_finish, "t_finish")
        spec = ScheduleSpec(model_interpolant=flow.interpolant, t_finish=self.t_finish, strength=strength, **path)
        self.schedule: Schedule = self.method.schedule(spec)
        self.passes = 1 if self.guidance == 1.0 else 2

    def plan(self, budget: int) -> Plan:
        plan = self.method.plan(self.schedule, budget // self.passes, self.config.chains, self.config.lanes)
        if not (any(plan.finished) or bool(self.schedule.finished.any())):
            last = float(self.schedule.linear_time[-1])
            raise OptionError(
                f"with tail={self.config.tail} a trajectory ends at t = {last:.3g}, and no sample is finished above "
                f"t = {self.t_finish:g}: leave tail out, or raise it"
            )
        return plan

    def engine(
        self, flow: Any, reward: Any, plan: Plan, slots: int, micro_batch: int, cond: Conditions,
        reward_cond: Conditions, device: torch.device, dtype: torch.dtype = torch.float32,
        null_cond: Conditions | None = None,
    ) -> Search:  # fmt: skip
        """A batch of slots. cond, reward_cond: of one prompt; null_cond: where it is not like cond. Raises OptionError
        where it could not fit the device."""
        self._check_room(math.prod(flow.shape) * dtype.itemsize, plan, slots, micro_batch, device)
        kind = Search if self.config.gradient is None else Steered
        return kind(
            flow,
            reward,
            self.method.module(plan, slots),
            self.schedule,
            slots=slots,
            chains=plan.chains,
            lanes=plan.lanes,
            passes=self.passes,
            micro_batch=micro_batch,
            accept=torch.tensor(plan.accept, device="cpu"),
            margin=plan.margin,
            carry=plan.carry,
            finished=torch.tensor(plan.finished, device="cpu") if plan.finished else self.schedule.finished,
            cond=cond,
            null_cond=(cond if null_cond is None else null_cond) if self.passes == 2 else {},
            reward_cond=reward_cond,
            top=self.config.finalists or self.config.top_k,
            dtype=dtype,
            device=device,
        ).to(device)

    def _check_room(self, latent: int, plan: Plan, slots: int, micro_batch: int, device: torch.device) -> None:
        """What the state of a batch takes (flowfast/rounds), latents of `latent` bytes: a slip such as
        slots=60000 is an error before memory is taken, not a killed process."""
        chains, kept = slots * plan.chains, slots * (self.config.finalists or self.config.top_k)
        lanes = -(-chains * plan.lanes // micro_batch) * micro_batch
        bytes_needed = latent * (4 * chains + 2 * kept + 3 * lanes) + 64 * lanes
        bytes_needed += 8 * self.schedule.rows * (3 * chains + 2 * kept)
        if bytes_needed > size_of(device):
            raise OptionError(
                f"a batch of {slots} slots with {plan.chains} chains of {plan.lanes} lanes and micro-batches of "
                f"{micro_batch} needs {bytes_needed / 1e9:,.0f} GB, but {device} has {size_of(device) / 1e9:,.0f} GB: "
                "lower slots, chains, lanes, top_k or micro_batch, or the budget"
            )


def checked_latents(latents: Any, prompts: int, flow: Flow, setup: Setup, plan: Plan) -> Tensor:
    """Own initial noise, float32 (prompts, *shape) or (prompts, chains, *shape). Raises OptionError."""
    shape, method = tuple(flow.shape), setup.config.method
    latents = real_latents(latents)
    if tuple(latents.shape) not in ((prompts, *shape), (prompts, plan.chains, *shape)):
        raise OptionError(
            f"latents must be (prompts, *shape) or (prompts, chains, *shape), prompts = {prompts}, "
            f"chains = {plan.chains}, shape = {shape}, got {tuple(latents.shape)}"
        )
    if tuple(latents.shape) == (prompts, *shape) and plan.chains > 1 and not bool(setup.schedule.searchable[1:].any()):
        raise OptionError(
            f"method {method!r} would run {plan.chains} identical chains from one own latent, for no noise follows: "
            "give latents (prompts, chains, *shape), chains=1, or a path that adds noise"
        )
    return latents


def real_latents(latents: Any) -> Tensor:
    """Latents of any shape as float32. Raises OptionError."""
    if not isinstance(latents, Tensor) or latents.is_complex() or latents.dtype == torch.bool or unusual(latents):
        came = f"{unusual(latents)} {latents.dtype}".strip() if isinstance(latents, Tensor) else type(latents).__name__
        raise OptionError(f"latents must be a tensor of real numbers, got {came}")
    latents = latents.detach().to(torch.float32)
    if not bool(latents.isfinite().all()):
        raise OptionError("latents must be finite float32 numbers, got NaN or infinity among them")
    return latents


def fitting_rows(slots: int, plan: Plan) -> int:
    """Rows of a micro-batch: as many as a round of all slots fills, at most 32."""
    return min(32, 1 << (slots * max(plan.widths()) - 1).bit_length())


def _number(value: Any, name: str) -> float:
    """A number of the model's. Raises OptionError."""
    try:
        return float(value)
    except (TypeError, ValueError):
        raise OptionError(f"expected {name} of the model to be a number, got {show(value)}") from None


def _guidance(flow: Flow, config: SearchConfig) -> float:
    """The scale of classifier-free guidance, 1 where it is off: that is up to 1, as pipelines have it."""
    scale = _number(flow.guidance, "guidance") if config.guidance is None else config.guidance
    if not 0 <= scale < math.inf:
        raise OptionError(f"guidance must be a finite number of at least 0 (up to 1: off), got {scale}")
    return max(1.0, scale)


def _finalists(flow: Flow, config: SearchConfig) -> int | None:
    """How many samples are decoded in full and scored again; None: the search sees full images all along."""
    if defaults_of(flow).preview is None:
        if config.finalists is not None:
            raise OptionError("finalists are for a model with a preview decoder: give it preview_decoder, or leave it")
        return None
    count = max(4, config.top_k) if config.finalists is None else config.finalists
    if count < max(1, config.top_k):
        raise OptionError(f"finalists must be at least top_k, {config.top_k}, got {count}")
    return count


def resolve_path(flow: Flow, config: SearchConfig, method: Method) -> dict[str, Any]:
    """Values of PATH_OPTIONS, all filled in. Raises OptionError for an unknown preset.

    A method may prefer a path of its own (best-of-n: the plain ODE); a model may have `path_defaults`.
    """
    known = defaults_of(flow)
    chosen = {name: getattr(config, name) for name in PATH_OPTIONS if getattr(config, name) is not None}
    defaults = {**FALLBACK, **known.path_defaults}
    defaults.update(method.path)
    if known.own_times and method.path.get("diffusion") == "zero":  # the model's own path: its own times
        defaults.update(grid="model", steps=None)
    if config.preset is not None:
        if config.preset not in PRESETS:
            raise OptionError(f"unknown preset {config.preset!r}: choose one of {', '.join(PRESETS)}")
        defaults.update(PRESETS[config.preset])
    # A default integrator that takes no diffusion coefficient must not meet one that the caller chose.
    if "diffusion" in chosen and "integrator" not in chosen:
        defaults["integrator"] = "euler-maruyama"
    if "integrator" in chosen and "diffusion" not in chosen:
        defaults["diffusion"] = None
    if "grid" in chosen and "steps" not in chosen and chosen["grid"].startswith(("times:", "linear-times:")):
        defaults["steps"] = None  # as many as the times that were named
    return _own_times(known, {**defaults, **chosen})


def _own_times(known: FlowDefaults, values: dict[str, Any]) -> dict[str, Any]:
    """Grid "model" spelled out: the times at which the model's own sampler of so many steps evaluates it."""
    if values["grid"] != "model":
        return values
    if known.own_times is None:
        raise OptionError('grid "model" needs a model that has a sampler of its own; choose another grid')
    times = asked("the model's own_times", known.own_times, values["steps"])
    return {**values, "grid": "linear-times:" + ",".join(repr(float(time)) for time in times), "steps": None}
