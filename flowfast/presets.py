"""Where a search gets its path, noise and grid from: options, then a preset, then the method's own path,
then the model's defaults."""

from __future__ import annotations

from typing import Any

from flowfast.config import SearchConfig
from flowfast.errors import OptionError
from flowfast.searcher.plan import PAPER, Method
from flowfast.types import Flow

PATH_OPTIONS = ("interpolant", "diffusion", "integrator", "grid", "steps", "tail", "shift")
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


def resolve_path(flow: Flow, config: SearchConfig, method: Method) -> dict[str, Any]:
    """Values of PATH_OPTIONS, all filled in. Raises OptionError for an unknown preset.

    A method may prefer a path of its own (best-of-n: the plain ODE); a model may carry `path_defaults`.
    """
    chosen = {name: getattr(config, name) for name in PATH_OPTIONS if getattr(config, name) is not None}
    defaults = {**FALLBACK, **getattr(flow, "path_defaults", {})}
    defaults.update(method.path)
    if hasattr(flow, "own_times") and method.path.get("diffusion") == "zero":  # the model's own path: its own times
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
    return _own_times(flow, {**defaults, **chosen})


def _own_times(flow: Flow, values: dict[str, Any]) -> dict[str, Any]:
    """Grid "model" spelled out: the times at which the model's own sampler of so many steps evaluates it."""
    if values["grid"] != "model":
        return values
    if not hasattr(flow, "own_times"):
        raise OptionError('grid "model" needs a model that has a sampler of its own; choose another grid')
    times = flow.own_times(values["steps"] or flow.own_steps)  # type: ignore[attr-defined]
    return {**values, "grid": "linear-times:" + ",".join(map(repr, times)), "steps": None}
