"""The one configuration object of a search: typed, frozen, unknown options rejected."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from flowfast import secrets
from flowfast.errors import OptionError


class SearchConfig(BaseModel):
    """Everything that a search depends on beside model weights, reward weights and prompts. None: the default of the
    method, else of the model."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    model: str = "scenes"
    model_options: dict[str, Any] = {}
    """For a diffusers pipeline: options of `flowfast.from_diffusers` (height, width, steps, dtype, ...)."""
    reward: str = "scenes"
    method: str = "rbf"
    method_options: dict[str, Any] = {}
    preset: str | None = None
    """Named settings of path, noise and grid: "paper" (arXiv 2503.19385), "linear", "vp"; single options override
    it."""
    budget: int | None = None
    """Model evaluations x passes (NFE) a prompt."""
    seconds: float | None = None
    """Wall-clock a prompt, instead of a budget in NFE."""
    steps: int | None = None
    interpolant: str | None = None
    diffusion: str | None = None
    integrator: str | None = None
    grid: str | None = None
    tail: int | None = None
    shift: float | None = None
    guidance: float | None = None
    """Scale of classifier-free guidance, in two passes: u = u_null + scale (u - u_null). Up to 1 it is off, one pass.
    What a distilled model takes as an input (FLUX dev) is another scale: `guidance` of `flowfast.from_diffusers`."""
    gradient: str | None = None
    """Gradient guidance, "dps:0.5": the reward's gradient steers every step (flowfast/flow/gradient.py). An evaluation
    then costs a backward pass on top, which NFE do not count. On CUDA some backward passes add in any order: last bits
    may differ from run to run."""
    negative_prompt: str = ""
    chains: int | None = None
    lanes: int | None = None
    seed: int = 0
    repeat: int = 0
    """Which sample of the same prompt and seed: another repeat, another noise."""
    micro_batch: int | None = None
    """Rows a model call; results are bit-identical at equal micro-batch, threads and machine class."""
    splits: tuple[tuple[int, int], ...] = ()
    """(rounds, rows): until the call had run so many rounds a model call had so many rows, then the device ran out of
    memory; its rerun repeats it. After the last of them, and in a replay, it has `micro_batch` rows."""
    slots: int | None = None
    """Prompts in one batch."""
    cuts: tuple[tuple[int, int, int], ...] = ()
    """(prompt, round, evaluations left): what a budget in seconds took away for lack of time; its rerun repeats it."""
    cuda_graphs: bool = True
    """On CUDA: replay rounds from a graph; results are the same without."""
    compile: bool = False
    """Run model and decoder through torch.compile: faster after a first call of up to minutes; last bits may differ."""
    overlap: bool = True
    """With a reward on the host: two groups of slots take turns, so that the host scores one while the device runs the
    other; at equal micro-batch results are the same without."""
    top_k: int = 1
    finalists: int | None = None
    """With a preview decoder: how many of the best samples by the preview are decoded in full, scored again and ranked
    anew; default: 4, or top_k where that is more. `until` looks at previews."""
    until: float | None = None
    """Stop a prompt as soon as a finished sample has this reward."""
    reward_deadline: float | None = None
    """Seconds that one call of a host reward may take; it has at most 64 images (flowfast/rewards/host.py)."""

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


def make_config(options: dict[str, Any]) -> SearchConfig:
    """The configuration from options; OptionError names what is unknown or wrong, and the valid names."""
    unknown = sorted(set(options) - set(SearchConfig.model_fields))
    if unknown:
        raise OptionError(f"unknown option {unknown[0]!r}: choose of {', '.join(sorted(SearchConfig.model_fields))}")
    try:
        return SearchConfig(**options)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        came = repr(first["input"])
        if name.startswith("model_options"):  # it may hold a secret that no name gives away
            came = type(first["input"]).__name__
        raise OptionError(f"option {name!r}: {first['msg'].lower()}, got {came}") from None
