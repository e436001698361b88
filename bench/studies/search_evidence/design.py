"""What is compared: arms, paths, budgets, seeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from flowfast.config import SearchConfig, make_config
from flowfast.errors import OptionError
from flowfast.methods.base import ODE
from flowfast.models.scenes.prompts import hard_prompts

PATHS: dict[str, dict[str, Any]] = {
    "base": {**ODE, "steps": 10, "guidance": 3.0},
    "fast": {
        **ODE,
        "grid": "linear-times:1,.92,.84,.75,.65,.52,.33,.1",
        "guidance": 3.0,
        "guidance_interval": [0.5, 0.8],
    },
    "linear": {"interpolant": "linear"},
    "vp": {"interpolant": "vp"},
}
"""base: the model's own ODE in ten guided steps, 20 NFE a sample. fast: in eight steps, guided at .75, .65 and .52, 11
NFE a sample. linear, vp: the noisy paths that the methods of the literature walk."""
METHODS: dict[str, dict[str, Any]] = {
    **{name: {"method": name} for name in ("ode", "bon", "prune", "auto", "smc", "code", "svdd", "sop")},
    **{f"{name}+pool": {"method": name, "pool": True} for name in ("bon", "prune")},
    "rbf-margin0": {"method": "rbf", "method_options": {"margin": 0.0}},
    "rbf-margin1": {"method": "rbf", "method_options": {"margin": 1.0}},
}
"""rbf-margin0: the paper's rule. rbf-margin1: the margin that suits `scenes`. +pool: all prompts share one budget."""
OWN_PATH = ("ode", "bon", "prune", "auto", "bon+pool", "prune+pool")
"""They walk the model's own ODE."""
BASELINE = "bon"
BUDGETS = (50, 100, 200, 500)
SLOTS = MICRO_BATCH = 32


class Arm(NamedTuple):
    """A method on a path."""

    method: str
    path: str

    def __str__(self) -> str:
        return f"{self.method}/{self.path}"

    @property
    def baseline(self) -> Arm:
        """Best-of-n on the same path; where that is a noisy one, on the base path, where best-of-n is better."""
        return Arm(BASELINE, self.path if self.method in OWN_PATH else "base")


class Job(NamedTuple):
    """One search call: all prompts."""

    arm: Arm
    budget: int
    """NFE a prompt."""
    seed: int


ARMS = tuple(
    [Arm(method, path) for path in ("base", "fast") for method in OWN_PATH]
    + [Arm(method, path) for method in METHODS if method not in OWN_PATH for path in ("linear", "vp")]
)


@dataclass(frozen=True)
class Study:
    """What is compared. The folder of a run remembers it: another study is refused there, more budgets and seeds are
    not."""

    split: str = "heldout"
    prompts: tuple[str, ...] = ()
    """Default: the whole half."""
    budgets: tuple[int, ...] = ()
    """Default: all on the held-out half; on the tuning half the one at which an arm is chosen, 500."""
    seeds: int = 3
    slots: int = SLOTS
    micro_batch: int = MICRO_BATCH
    equal_cost: bool = True
    """Does each method also get a budget that costs what best-of-n's does?"""

    def __post_init__(self) -> None:
        if self.split not in ("heldout", "tuning"):
            raise OptionError(f"unknown split {self.split!r}: choose heldout or tuning")
        if self.seeds < 1:
            raise OptionError(f"expected at least one seed, got {self.seeds}")
        held = self.split == "heldout"
        object.__setattr__(self, "prompts", self.prompts or tuple(hard_prompts(self.split)))  # type: ignore[arg-type]
        object.__setattr__(self, "budgets", self.budgets or (BUDGETS if held else (max(BUDGETS),)))
        object.__setattr__(self, "equal_cost", self.equal_cost and held)

    def fixed(self) -> dict[str, Any]:
        """What all runs into one folder have in common, as JSON has it."""
        return {
            "split": self.split,
            "prompts": list(self.prompts),
            "slots": self.slots,
            "micro_batch": self.micro_batch,
        }

    def config(self, arm: Arm, budget: int, seed: int = 0) -> SearchConfig:
        """The search of one job. Raises OptionError where there is no such method or path yet."""
        sizes = {"slots": self.slots, "micro_batch": self.micro_batch}
        options = {"model": "scenes", "reward": "scenes", "budget": budget, "seed": seed, **sizes}
        return make_config({**options, **METHODS[arm.method], **PATHS[arm.path]})


def chosen_arms(names: str) -> tuple[Arm, ...]:
    """Arms by names with commas between them: "bon/base", or "bon" for all of its paths; "": all. Raises
    OptionError."""
    words = [word.strip() for word in names.split(",") if word.strip()]
    for word in words:
        if not any(word in (str(arm), arm.method) for arm in ARMS):
            raise OptionError(f"no arm {word!r}: choose of {', '.join(map(str, ARMS))}")
    return tuple(arm for arm in ARMS if not words or arm.method in words or str(arm) in words)
