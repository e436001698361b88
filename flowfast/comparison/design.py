"""What is compared: the arms, their searches, and the order in which they take turns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from flowfast import rewards, secrets
from flowfast.config import SearchConfig, make_config
from flowfast.errors import FlowfastError, OptionError
from flowfast.prompts import check_each, encoded
from flowfast.report.pictures import base_of
from flowfast.resolve import PRESETS, resolve
from flowfast.types import Flow

PICTURES = 8  # prompts on the contact sheet


class Arm(NamedTuple):
    """One thing that is compared: a method ("rbf"; steered by a gradient, "rbf+dps:1"; with one budget for all prompts
    of a search call, "bon+pool") on a path with a budget in NFE or in seconds a prompt."""

    method: str
    interpolant: str
    budget: int | None
    seconds: float | None

    @property
    def slug(self) -> str:
        return f"{self.method}-{self.interpolant}-{self.amount}".replace(":", "_").replace(" ", "")

    @property
    def amount(self) -> str:
        return f"{self.budget} NFE" if self.budget is not None else f"{self.seconds:g} s"


Job = tuple[Arm, int, tuple[str, ...]]
"""(arm, seed, chunk of prompts): one search call."""


@dataclass(frozen=True)
class Comparison:
    """What is compared. The folder of a run remembers it: another comparison is refused there."""

    prompts: tuple[str, ...]
    methods: tuple[str, ...] = ("ode", "bon", "sop", "smc", "code", "svdd", "rbf")
    budgets: tuple[int, ...] = (100, 200, 500)
    seconds: tuple[float, ...] = ()
    interpolants: tuple[str, ...] = ("linear",)
    """Interpolants, or names of presets ("paper")."""
    seeds: int = 3
    chunk: int = 16
    """Prompts in one search call."""
    model: str = "scenes"
    reward: str = "scenes"
    steps: int | None = None
    micro_batch: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", secrets.sealed(self.reward))

    def arms(self) -> list[Arm]:
        """All arms. "ode" needs no budget: it is one sample, so it is run once, on the model's own path."""
        amounts = [(budget, None) for budget in self.budgets] + [(None, seconds) for seconds in self.seconds]
        found = []
        for method in self.methods:
            for path in self.interpolants:
                if base_of(method) == "ode":
                    found += [Arm(method, path, self.budgets[0], None)] if path == self.interpolants[0] else []
                else:
                    found += [Arm(method, path, budget, seconds) for budget, seconds in amounts]
        return found

    def config(self, arm: Arm, seed: int) -> SearchConfig:
        """The search of one arm. Raises OptionError."""
        method, *more = arm.method.split("+")
        pool = "pool" in more
        gradient = "+".join(part for part in more if part != "pool")
        path = {"preset" if arm.interpolant in PRESETS else "interpolant": arm.interpolant}
        return make_config(
            {
                "model": self.model,
                "reward": self.reward,
                "method": method,
                "gradient": gradient or (None if pool or not more else ""),
                "pool": pool,
                "budget": arm.budget,
                "seconds": arm.seconds,
                "steps": self.steps,
                "seed": seed,
                "micro_batch": self.micro_batch,
                "slots": self.chunk,
                **path,
            }
        )

    def jobs(self) -> Iterator[Job]:
        """(arm, seed, chunk of prompts) in the order they run: arms innermost, each time starting with another."""
        arms, turn = self.arms(), 0
        for seed in range(self.seeds):
            for start in range(0, len(self.prompts), self.chunk):
                for k in range(len(arms)):
                    yield arms[(turn + k) % len(arms)], seed, self.prompts[start : start + self.chunk]
                turn += 1


def fitting_batch(prompts: int) -> int:
    """Rows of one model call that `prompts` prompts with two chains each fill: a power of two, at most 32."""
    return min(32, 1 << max(0, 2 * prompts - 1).bit_length())


def check(comparison: Comparison, flow: Flow) -> None:
    """Raises a FlowfastError that names the arm unless every arm can run."""
    for name in ("prompts", "methods", "interpolants"):
        if not getattr(comparison, name):
            raise OptionError(f"expected at least one of --{name}, got none")
    if not comparison.budgets and not comparison.seconds:
        raise OptionError("expected at least one of --budgets or --seconds, got neither")
    if comparison.seeds < 1 or comparison.chunk < 1:
        raise OptionError(f"--seeds and --chunk must be at least 1, got {comparison.seeds} and {comparison.chunk}")
    if not comparison.budgets and "ode" in map(base_of, comparison.methods):
        raise OptionError("method 'ode' needs one of --budgets: add one, or leave it out of --methods")
    secrets.opened(comparison.reward)
    encoded(flow.encode, list(comparison.prompts))
    reward = rewards.load(comparison.reward, flow)
    if rewards.on_host(reward):
        check_each(comparison.prompts, reward.check)
    for arm in comparison.arms():
        try:
            resolved = resolve(flow, comparison.config(arm, 0).params)
            if arm.budget is not None:
                resolved.plan(arm.budget)
        except FlowfastError as error:
            raise type(error)(f"{arm.method} on {arm.interpolant} at {arm.amount}: {error}") from None
