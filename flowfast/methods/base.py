"""What a search method is: a plan of its budget, and a module that regroups chains and weighs children.

With these two, best-of-n, SMC, CoDe, SVDD, search over paths and rollover budget forcing are a few lines each, and one
loop (flowfast/rounds/batch.py) runs them all.
"""

from dataclasses import dataclass, fields
from inspect import getdoc
from typing import Annotated, Any, ClassVar

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from flowfast.bounds import MOST_ROWS, Within, refused
from flowfast.errors import OptionError
from flowfast.flow.schedule import Schedule, ScheduleSpec, build_schedule
from flowfast.methods.plan import Plan

Chosen = Annotated[int | None, Within(1, MOST_ROWS)]  # how many of something; None: the method's own rule
Positive = Annotated[float, Within(0, 1e9, above=True)]
Weights = tuple[Annotated[float, Within(0, 1e9)], ...]
Margin = Annotated[float, Within(-1e9, 1e9)]
LinearTime = Annotated[float, Within(0, 1, above=True)]

ODE: dict[str, Any] = {
    "interpolant": "linear",
    "diffusion": "zero",
    "integrator": "euler-maruyama",
    "grid": "uniform",
}
"""The model's own deterministic path, for methods that do not branch along it."""
PAPER: dict[str, Any] = {
    "interpolant": "vp",
    "diffusion": "square:3",
    "integrator": "euler-maruyama",
    "grid": "paper",
    "steps": 10,
}
"""Settings of arXiv 2503.19385."""


class Chains(nn.Module):
    """The part of a method that runs inside the loop, on tensors only. This one compares raw rewards and leaves
    chains alone."""

    regroups: torch.jit.Final[bool]
    draws: torch.jit.Final[bool]
    ends: torch.jit.Final[bool]

    def __init__(self, regroups: bool = False, draws: bool = False, temperature: float = 1.0, ends: bool = False):
        """draws: children compete with reward / temperature + bias instead of their rewards. ends: a regrouping may end
        chains; the others then go on in the first places, with what the plan has for these."""
        super().__init__()
        self.regroups, self.draws, self.ends, self.temperature = regroups, draws, ends, float(temperature)

    @torch.jit.export
    def reset(self, slot: int, quota: Tensor) -> None:
        """A new request moves into the slot. quota (C, T): its candidates at each transition."""

    @torch.jit.export
    def bias(self, key: Tensor, transition: Tensor, candidate: Tensor, chain: Tensor) -> Tensor:
        """(N,) for the lanes with these addresses (N,) each; asked for only if the method draws."""
        return torch.zeros_like(key, dtype=torch.float32)

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        """ancestors (S, C): chain n goes on from chain ancestors[n], or ends where that is -1; survivors keep their
        place. rewards (S, C) of the parents (-inf: dead); transition (S,): the one just taken; moved (S,): did the slot
        take one?"""
        return torch.arange(rewards.size(1), device=rewards.device).expand_as(rewards)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Base of all method configurations. The fields of a subclass are its options; its first docstring line is what
    `flowfast methods` prints."""

    name: ClassVar[str] = ""
    branches: ClassVar[bool] = True
    """Branching with zero diffusion makes identical children: such methods refuse it."""
    path: ClassVar[dict[str, Any]] = {}
    """Path, noise and grid that the method prefers to the model's defaults."""
    wave: ClassVar[int | None] = 0
    """Chains that a prompt gets of a shared budget at once (flowfast/pool); 0: what half of its share pays for; None:
    it has no use for more budget."""

    def schedule(self, spec: ScheduleSpec) -> Schedule:
        """The transitions; most methods go down the grid once."""
        return build_schedule(spec)

    def plan(self, schedule: Schedule, budget: int, chains: int | None, lanes: int | None) -> Plan:
        """budget: NFE; schedule.passes says what an evaluation costs. Raises BudgetError, OptionError."""
        raise NotImplementedError

    def module(self, plan: Plan, slots: int) -> Chains:
        return Chains()

    def check(self, schedule: Schedule) -> None:
        """Raises OptionError where children of one parent would be identical."""
        if self.branches and not bool(schedule.searchable[1:].any()):
            raise OptionError(
                f"method {self.name!r} branches, so it needs noise, but this diffusion is zero and children would be "
                "identical: choose --diffusion square:3 (or another), or method 'bon'"
            )


METHODS: dict[str, type[Method]] = {}
ADAPTERS: dict[str, TypeAdapter[Method]] = {}
"""They check the options of each, and take milliseconds to make."""


def register(method: type[Method]) -> type[Method]:
    METHODS[method.name] = method
    ADAPTERS.pop(method.name, None)
    return method


def described() -> dict[str, str]:
    """The methods there are, with the first paragraph that each says of itself."""
    return {name: " ".join((getdoc(method) or "").split("\n\n")[0].split()) for name, method in sorted(METHODS.items())}


def make_method(name: str, options: dict[str, object]) -> Method:
    """The configuration of a method by name. Raises OptionError naming the valid names or options."""
    if name not in METHODS:
        raise OptionError(f"unknown method {name!r}: choose one of {', '.join(sorted(METHODS))}")
    valid = {f.name for f in fields(METHODS[name])}
    for option in options:
        if option not in valid:
            instead = f"choose of {', '.join(sorted(valid))}" if valid else "leave it out, or name another method"
            raise OptionError(f"method {name!r} has no option {option!r}: {instead}")
    try:
        if name not in ADAPTERS:
            ADAPTERS[name] = TypeAdapter(METHODS[name])
        return ADAPTERS[name].validate_python(options)
    except ValidationError as error:
        raise refused(error, f"option of method {name!r}:") from None
