"""What params mean on one flow: method, schedule, passes and plan, and the batch of slots that runs them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowfast.config import SearchParams, make
from flowfast.errors import ModelError, OptionError
from flowfast.flow import ScheduleSpec
from flowfast.flow.gradient import parse_gradient
from flowfast.flow.schedule import Schedule
from flowfast.methods import make_method
from flowfast.methods.base import PAPER, Method
from flowfast.methods.plan import Plan
from flowfast.models.answers import asked, defaults_of, latent_shape, unusual
from flowfast.prompts.fields import show
from flowfast.rounds.batch import SlotBatch
from flowfast.rounds.lanes import Examples, Rules
from flowfast.rounds.room import bytes_of, check_room
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


@dataclass(frozen=True)
class Resolved:
    """What the params of a request mean on one flow."""

    params: SearchParams
    """With path, guidance and finalists filled in."""
    method: Method
    schedule: Schedule
    """Its passes say where guidance acts."""
    guidance: float
    t_finish: float

    @property
    def passes(self) -> int:
        """NFE of the dearest evaluation: 2 where the null condition is needed at all."""
        return int(self.schedule.passes.max())

    def plan(self, budget: int) -> Plan:
        """The plan of a budget in NFE. Raises BudgetError, OptionError."""
        params = self.params
        plan = self.method.plan(self.schedule, budget, params.chains, params.lanes)
        if not (any(plan.finished) or bool(self.schedule.finished.any())):
            last = float(self.schedule.linear_time[-1])
            raise OptionError(
                f"with tail={params.tail} a trajectory ends at t = {last:.3g}, and no sample is finished above "
                f"t = {self.t_finish:g}: leave tail out, or raise it"
            )
        everywhere = params.score_all or params.gradient is not None  # a gradient scores every child anyway
        scored = [] if everywhere else plan.read(self.schedule.finished.tolist())
        return replace(plan, scored=scored, passes=self.schedule.passes.tolist())

    def bytes(self, flow: Any, plan: Plan, slots: int, micro_batch: int, dtype: torch.dtype = torch.float32) -> int:
        """What a batch takes of the device's memory, beside model and conditions."""
        latent, top = math.prod(flow.shape) * dtype.itemsize, self.params.finalists or self.params.top_k
        sizes = {"slots": slots, "chains": plan.chains, "lanes": plan.lanes, "micro_batch": micro_batch}
        return bytes_of(latent, self.schedule.transitions, top, **sizes)

    def batch(
        self, flow: Any, reward: Any, plan: Plan, slots: int, micro_batch: int, cond: Conditions,
        reward_cond: Conditions, device: torch.device, dtype: torch.dtype = torch.float32,
        null_cond: Conditions | None = None, captured: bool = False,
    ) -> SlotBatch:  # fmt: skip
        """A batch of slots. cond, reward_cond: of one prompt; null_cond: where it is not like cond. captured: its model
        calls run in CUDA graphs. Raises OptionError where it could not fit the device."""
        sizes = {"slots": slots, "chains": plan.chains, "lanes": plan.lanes, "micro_batch": micro_batch}
        top = self.params.finalists or self.params.top_k
        check_room(self.bytes(flow, plan, slots, micro_batch, dtype), device, **sizes)
        rules = Rules(
            passes=self.schedule.passes,
            accept=torch.tensor(plan.accept, device="cpu"),
            scored=torch.tensor(plan.scored or [True] * self.schedule.transitions, device="cpu"),
            finished=torch.tensor(plan.finished, device="cpu") if plan.finished else self.schedule.finished,
            margin=plan.margin,
            carry=plan.carry,
        )
        null = (cond if null_cond is None else null_cond) if self.passes == 2 else {}
        kind = SlotBatch if self.params.gradient is None else Steered
        method, examples = self.method.module(plan, slots), Examples(cond, null, reward_cond)
        return kind(
            flow,
            reward,
            method,
            self.schedule,
            rules,
            examples,
            **sizes,
            top=top,
            dtype=dtype,
            device=device,
            captured=captured,
        ).to(device)


def resolve(flow: Flow, params: SearchParams) -> Resolved:
    """Raises OptionError, ModelError: what is asked for does not exist, or does not go with this flow."""
    method = chosen_method(flow, params)
    latent_shape(asked("the model's shape", lambda: flow.shape))
    path, guidance = resolve_path(flow, params, method), _guidance(flow, params)
    interval = _interval(params) if guidance > 1.0 else None
    facts = {**path, "guidance": guidance, "guidance_interval": interval, "finalists": _finalists(flow, params)}
    t_finish = _number(flow.t_finish, "t_finish")
    strength = 0.0 if params.gradient is None else parse_gradient(params.gradient).strength
    spec = ScheduleSpec(model_interpolant=flow.interpolant, t_finish=t_finish, strength=strength, **path)
    schedule = method.schedule(spec)
    schedule = schedule.guided(interval) if guidance > 1.0 else schedule
    return Resolved(params.model_copy(update=facts), method, schedule, guidance, t_finish)


def chosen_method(flow: Flow, params: SearchParams) -> Method:
    """With the options that the flow prefers where none were given. Raises OptionError."""
    preferred = defaults_of(flow).method_defaults.get(params.method, {})
    return make_method(params.method, {**preferred, **params.method_options})


def checked_latents(latents: Any, prompts: int, flow: Flow, resolved: Resolved, plan: Plan) -> Tensor:
    """Own initial noise, float32 (prompts, *shape) or (prompts, chains, *shape). Raises OptionError."""
    shape, method = tuple(flow.shape), resolved.params.method
    latents = real_latents(latents)
    if tuple(latents.shape) not in ((prompts, *shape), (prompts, plan.chains, *shape)):
        raise OptionError(
            f"latents must be (prompts, *shape) or (prompts, chains, *shape), prompts = {prompts}, "
            f"chains = {plan.chains}, shape = {shape}, got {tuple(latents.shape)}"
        )
    noisy = bool(resolved.schedule.searchable[1:].any())
    if tuple(latents.shape) == (prompts, *shape) and plan.chains > 1 and not noisy:
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


def _guidance(flow: Flow, params: SearchParams) -> float:
    """The scale of classifier-free guidance, 1 where it is off: that is up to 1, as pipelines have it."""
    scale = _number(flow.guidance, "guidance") if params.guidance is None else params.guidance
    if not 0 <= scale < math.inf:
        raise OptionError(f"guidance must be a finite number of at least 0 (up to 1: off), got {scale}")
    return max(1.0, scale)


def _interval(params: SearchParams) -> tuple[float, float] | None:
    """Where guidance acts. Raises OptionError."""
    interval = params.guidance_interval
    if interval is not None and not interval[0] <= interval[1]:
        raise OptionError(f"guidance_interval must be (low, high), got {interval}: exchange its ends")
    return interval


def _finalists(flow: Flow, params: SearchParams) -> int | None:
    """How many samples are decoded in full and scored again; None: the search sees full images all along."""
    if defaults_of(flow).preview is None:
        if params.finalists is not None:
            raise OptionError("finalists are for a model with a preview decoder: give it preview_decoder, or leave it")
        return None
    count = max(4, params.top_k) if params.finalists is None else params.finalists
    if count < max(1, params.top_k):
        raise OptionError(f"finalists must be at least top_k, {params.top_k}, got {count}")
    return count


def resolve_path(flow: Flow, params: SearchParams, method: Method) -> dict[str, Any]:
    """Values of PATH_OPTIONS, all filled in. Raises OptionError for an unknown preset.

    A method may prefer a path of its own (best-of-n: the plain ODE); a model may have `path_defaults`.
    """
    known = defaults_of(flow)
    chosen = {name: getattr(params, name) for name in PATH_OPTIONS if getattr(params, name) is not None}
    try:
        make(SearchParams, known.path_defaults)
    except OptionError as error:
        raise ModelError(f"path_defaults of the model: {error}") from None
    defaults = {**FALLBACK, **known.path_defaults}
    defaults.update(method.path)
    if known.own_times and method.path.get("diffusion") == "zero":  # the model's own path: its own times
        defaults.update(grid="model", steps=None)
    if params.preset is not None:
        if params.preset not in PRESETS:
            raise OptionError(f"unknown preset {params.preset!r}: choose one of {', '.join(PRESETS)}")
        defaults.update(PRESETS[params.preset])
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
