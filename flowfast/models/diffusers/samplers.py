"""The sampler that came with a pipeline: which one it is, whether it walks a flow, and its times as it stands now.

Users change samplers after loading (`set_shift`), and that is in no config; a config that was not loaded from a file
does not name its class. diffusers is imported where a sampler is looked at, not before.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from itertools import groupby, pairwise
from operator import index
from typing import Any

from flowfast.errors import ModelError, OptionError

EULER = "FlowMatchEulerDiscreteScheduler"
FLOWS = (EULER, "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler", "LTXEulerAncestralRFScheduler")
"""Samplers of diffusers that walk flows and nothing else."""
CAN_FLOW = (
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "SASolverScheduler",
)
"""Samplers of diffusers that walk a flow where their config says so."""
OTHERS = {
    "FlowMapEulerDiscreteScheduler": "its model predicts mean velocities between two times",
    "MiniMaxH3Scheduler": "its timesteps rise",
}
"""Samplers of diffusers that look like a flow's."""
CHANGEABLE = ("_shift", "sigma_min", "sigma_max", "_scale_factors")
"""What decides a sampler's steps beside its config and can be changed on it: by `set_shift` and its like, and by
pipelines."""


def config_of(given: Any) -> dict[str, Any]:
    """The config of a scheduler, or a config as it is. Raises OptionError for what is neither."""
    config = getattr(given, "config", given)
    if not isinstance(config, Mapping) or not isinstance(config.get("_class_name", ""), str):
        raise OptionError(f"expected a scheduler, or its config with the name of its class, got {given!r:.200}")
    return dict(config)


def sampler_facts(given: Any) -> dict[str, Any]:
    """What there is to know of a scheduler, or of its config, in values that JSON keeps: class, config, and of a
    scheduler also what was changed on it. Raises OptionError for what is neither, ModelError where a config leaves its
    class open."""
    config = config_of(given)
    if hasattr(given, "config"):
        config |= {"_class_name": type(given).__name__, "live": _live(given)}
    elif config and "_class_name" not in config:
        config = {"_class_name": _class_of_fields(given), **config}
    # diffusers leaves in a config what other classes took, and how it came about.
    fields = _fields(config.get("_class_name", EULER)) or {key for key in config if key[0] != "_"}
    return {key: value for key, value in config.items() if key in fields | {"_class_name", "live"}}


def sampler_changed(facts: dict[str, Any], options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """`sampler_facts` with the options that its class takes, and those that it does not take. With other options a
    sampler is another: what was changed on it by hand is left out."""
    fields = _fields(facts.get("_class_name", EULER))
    taken = {key: value for key, value in options.items() if key in fields}
    left = {key: value for key, value in options.items() if key not in fields}
    return {key: value for key, value in facts.items() if not (taken and key == "live")} | taken, left


def sampler_from(facts: dict[str, Any]) -> Any:
    """The sampler of `sampler_facts`, without the state of a run. Raises ModelError where it is no flow's, OptionError
    where its class cannot be made from them."""
    import diffusers

    name = facts.get("_class_name", EULER)
    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "set_timesteps"):
        raise ModelError(f"{name} is no sampler of diffusers {diffusers.__version__}: give the pipeline a {EULER}")
    return _made(kind, facts)


def own_sampler(scheduler: Any) -> Any:
    """A copy of a pipeline's sampler as it stands now, with all that its class keeps; below a scheduler of flowfast's,
    the one that came with the pipeline. Raises ModelError where it is no flow's."""
    scheduler = getattr(scheduler, "own", scheduler)
    _check_flow(type(scheduler), {**scheduler.config, **_live(scheduler)})
    return copy.deepcopy(scheduler)


def sampler_times(sampler: Any, **arguments: Any) -> list[float]:
    """The linear times at which a sampler evaluates the model, falling, once each; calls its set_timesteps.

    A time of 0 is left out: nothing moves there any more.

    Raises:
        OptionError: arguments that it cannot take. ModelError: times that are not a flow's.
    """
    name = type(sampler).__name__
    given = {key: value for key, value in arguments.items() if value is not None}
    lengths = [len(given[key]) for key in ("sigmas", "timesteps") if key in given]
    steps: Any = given.get("num_inference_steps", max(lengths, default=None))
    if not hasattr(steps, "__index__") or index(steps) < 1:
        raise OptionError(f"{name}: expected num_inference_steps of at least 1, a whole number, got {steps!r}")
    untaken = sorted(set(given) - set(inspect.signature(sampler.set_timesteps).parameters))
    if untaken:
        raise OptionError(f"{name} takes no {', '.join(untaken)}: leave it out, or give the pipeline a {EULER}")
    try:
        sampler.set_timesteps(**given)
    except (ValueError, TypeError, AssertionError) as error:
        reason = str(error) or ("mu asks for use_dynamic_shifting=True in its config" if "mu" in given else repr(error))
        raise OptionError(f"{name} cannot set its timesteps: {reason}") from error
    times = [float(sigma) for sigma in sampler.sigmas[:-1]]
    once = [time for time, _ in groupby(times) if time != 0]
    falling = all(later < earlier for earlier, later in pairwise(once))
    if not (once and falling and 0 < once[-1] <= once[0] <= 1 + 1e-6):  # a NaN compares as false
        shown = [f"{time:.4g}" for time in times]
        shown = shown if len(shown) < 7 else [*shown[:3], "...", *shown[-3:]]
        raise ModelError(f"{name}: expected times of a flow, falling from at most 1, got {', '.join(shown)}")
    return once


def _made(kind: Any, facts: dict[str, Any]) -> Any:
    config, live = {key: value for key, value in facts.items() if key != "live"}, facts.get("live", {})
    _check_flow(kind, {**config, **live})
    try:
        sampler = kind.from_config(config)
    except (ValueError, TypeError, IndexError, ZeroDivisionError, ImportError) as error:
        raise OptionError(f"{kind.__name__} cannot be made from its config: {error}") from error
    for name, value in live.items():
        setattr(sampler, name, value)
    return sampler


def _check_flow(kind: Any, config: Any) -> None:
    """Raises ModelError where a class of samplers with this config is none of velocities."""
    why = _no_flow(kind, config)
    if why:
        raise ModelError(
            f"expected the sampler of a flow's velocity, from noise at 1 to data at 0, got {kind.__name__}: {why}; "
            f"give the pipeline a {EULER} with its own shift"
        )


def _no_flow(kind: Any, config: Any) -> str:
    """Why a class of samplers with this config is none of velocities; "": it is one, or of unknown make without a word
    against it (its times are looked at, too)."""
    classes = {base.__name__ for base in kind.__mro__}
    foreign = not kind.__module__.startswith("diffusers.")
    prediction = config.get("prediction_type", "flow_prediction")
    if prediction != "flow_prediction":
        return f"it predicts {prediction}"
    if classes & {*CAN_FLOW} and not config.get("use_flow_sigmas"):
        return "use_flow_sigmas is not set"
    if not classes & {*FLOWS, *CAN_FLOW} and not foreign:
        return OTHERS.get(kind.__name__, "what it predicts is unknown here")
    if config.get("invert_sigmas"):
        return "invert_sigmas lets its times rise"
    enlarged = config.get("_scale_factors", config.get("scale_factors"))
    return "scale_factors enlarge its latents on the way" if enlarged else ""


def _live(scheduler: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(scheduler).items() if name in CHANGEABLE}


def _class_of_fields(config: Any) -> str:
    """The class of a config that does not name it: Euler's, where its fields are. Raises ModelError."""
    import diffusers
    from diffusers.configuration_utils import FrozenDict

    fields = {name for name in config if name[0] != "_"}
    part = fields < _fields(EULER) and not isinstance(config, FrozenDict)  # FrozenDict: of a scheduler, with all fields
    if fields == _fields(EULER) or (part and fields != _fields("FlowMatchHeunDiscreteScheduler")):
        return EULER
    like = [name for name in dir(diffusers) if name.endswith("Scheduler") and fields == _fields(name)]
    what = f"the fields of {' or '.join(like)}" if like else f"the fields {', '.join(sorted(fields))}"
    raise ModelError(
        f"expected the config of a flow's sampler, got one that does not name its class, with {what}: give the "
        "scheduler itself (pipe.scheduler)"
    )


def _fields(name: str) -> set[str]:
    """What a class of diffusers takes; none for any other."""
    import diffusers

    kind = getattr(diffusers, name, None)
    return set() if kind is None else set(inspect.signature(kind.__init__).parameters) - {"self", "kwargs"}
