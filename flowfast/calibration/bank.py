"""The file of a calibration: rewards of whole trajectories at every transition, for each of some paths, as JSON."""

from __future__ import annotations

import hashlib
import json
import math
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
import torch
from pydantic import PrivateAttr, model_validator
from pydantic_core import PydanticCustomError

from flowfast.bounds import Within
from flowfast.config import Config, make
from flowfast.errors import FlowfastError, OptionError
from flowfast.files import write_bytes
from flowfast.surroundings import modules_of

NAME, FORMAT = "flowfast-calibration", 1
MOST_BYTES = 64 << 20
DIGITS = 6
"""Of each number that is kept."""
PER_WEIGHT = 64
"""Numbers of each weight that tell it from another."""
BLIND = 0.2
"""Below this rank correlation with the final reward no decision should stand on a reward."""
Time = Annotated[float, Within(0, 1, above=True)]
Seconds = Annotated[float, Within(0, 1e6)]


def _wrong(expected: str, came: str) -> PydanticCustomError:
    return PydanticCustomError("shape", "expected {expected}, got {came}", {"expected": expected, "came": came})


class BankPath(Config):
    """Rewards along one path of the model's plain ODE."""

    options: dict[str, Any]
    """Interpolant, grid, guidance, ...: all that a search takes to walk it."""
    linear_times: tuple[Time, ...]
    """(T,): of the posterior mean after each transition."""
    passes: tuple[Annotated[int, Within(1, 2)], ...]
    """(T,): NFE of each transition."""
    rewards: Any
    """(P, n, T): of each prompt, chain and transition."""
    mean: tuple[float, ...] = ()
    """(T,): reward of a posterior mean there. Like `sd` and `rho` it follows from the rewards."""
    sd: tuple[float, ...] = ()
    """(T,): its standard deviation among the chains of one prompt, mean over prompts."""
    rho: tuple[float, ...] = ()
    """(T,): Spearman's rank correlation with the final reward among the chains of one prompt, mean over prompts."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        T = len(self.linear_times)
        try:
            values = np.array(self.rewards, dtype=np.float64)
        except (TypeError, ValueError):
            raise _wrong("rewards as (prompts, chains, transitions) numbers", "something else") from None
        if values.ndim != 3 or values.shape[2] != T or min(values.shape) < 1 or values.shape[1] < 2:
            raise _wrong(f"rewards (prompts, at least 2 chains, {T} transitions)", f"{values.shape}")
        if not np.isfinite(values).all():
            raise _wrong("finite rewards", "NaN or infinity among them")
        if any(after >= before for before, after in zip(self.linear_times, self.linear_times[1:], strict=False)):
            raise _wrong("linear_times that fall", f"{self.linear_times}")
        if len(self.passes) != T:
            raise _wrong(f"passes of {T} transitions", f"{len(self.passes)}")
        found = statistics(values)
        for name, value in found.items():
            told = getattr(self, name)
            if told and not (len(told) == T and np.allclose(told, value, rtol=1e-3, atol=1e-3)):
                raise _wrong(f"{name} as it follows from the rewards", "other numbers")
            object.__setattr__(self, name, value)
        object.__setattr__(self, "rewards", values)
        return self

    @cached_property
    def digest(self) -> str:
        """Of the path and its rewards."""
        told = repr((self.options, self.linear_times, self.passes)).encode()
        return hashlib.blake2b(told + self.rewards.tobytes(), digest_size=8).hexdigest()

    @property
    def nfe(self) -> int:
        """Of one trajectory."""
        return sum(self.passes)

    @property
    def sees(self) -> list[int]:
        """Transitions before the last after which the reward tells something of the final one."""
        return [at for at, rho in enumerate(self.rho[:-1]) if rho >= BLIND]


class Bank(Config):
    """A calibration of one model and one reward."""

    model: str
    model_weights: str
    """Digest by which the model is known (`weights_of`)."""
    reward: str
    reward_weights: str
    prompts: tuple[str, ...]
    seed: int
    seconds_row: Seconds
    """Of a row through the model."""
    seconds_decode: Seconds
    """Of the picture of one row."""
    seconds_reward: Seconds
    """Of scoring one picture."""
    paths: tuple[BankPath, ...]
    """The first one is the model's own."""
    versions: dict[str, str] = {}
    _kept: dict[Any, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.paths:
            raise _wrong("at least one path", "none")
        for path in self.paths:
            if len(path.rewards) != len(self.prompts):
                raise _wrong(f"rewards of {len(self.prompts)} prompts", f"those of {len(path.rewards)}")
        return self

    @property
    def kept(self) -> dict[Any, Any]:
        """What was chosen by it in this process."""
        return self._kept

    @cached_property
    def digest(self) -> str:
        """Of all that it says."""
        return hashlib.blake2b(as_bytes(self), digest_size=8).hexdigest()


def statistics(rewards: np.ndarray) -> dict[str, tuple[float, ...]]:
    """`mean`, `sd` and `rho` of rewards (P, n, T), each (T,)."""
    rank = ranks(rewards)
    last = rank[..., -1:]
    size = np.sqrt((rank**2).sum(1) * (last**2).sum(1))
    rho = np.divide((rank * last).sum(1), size, out=np.zeros_like(size), where=size > 0)  # 0 where all are equal
    found = {"mean": rewards.mean((0, 1)), "sd": rewards.std(1, ddof=1).mean(0), "rho": rho.mean(0)}
    return {name: tuple(short(value) for value in values) for name, values in found.items()}


def ranks(rewards: np.ndarray) -> np.ndarray:
    """Centred ranks (P, n, T) among the n chains of a prompt; equal rewards share one."""
    one, other = rewards[:, :, None], rewards[:, None]
    return (np.sign(one - other).sum(2)) / 2


def short(value: float) -> float:
    """The number that the file keeps."""
    return float(f"{value:.{DIGITS}g}")


def as_bytes(bank: Bank) -> bytes:
    """The file's."""
    facts = bank.model_dump()
    for path, of in zip(facts["paths"], bank.paths, strict=True):
        path["rewards"] = [[list(map(short, chain)) for chain in prompt] for prompt in of.rewards.tolist()]
    text = json.dumps({"name": NAME, "format": FORMAT, **facts}, allow_nan=False, separators=(",", ":"))
    return text.encode() + b"\n"


def write(path: Path, bank: Bank) -> None:
    """Whole or not at all. Raises OutputError."""
    write_bytes(path, as_bytes(bank))


def read(path: Path) -> Bank:
    """Raises OptionError where it is no calibration, or damaged."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"it has more than {MOST_BYTES >> 20} MiB")
        facts = json.loads(data, parse_constant=_refuse)
        if not isinstance(facts, dict) or facts.pop("name", None) != NAME:
            raise ValueError("it is no calibration")
        if (found := facts.pop("format", None)) != FORMAT:
            raise ValueError(f"it has format {found!r}, this flowfast reads format {FORMAT}")
        return make(Bank, facts)
    except OSError as error:
        raise refused(path, error.strerror or str(error)) from None
    except FlowfastError as error:
        raise refused(path, str(error)) from None
    except (ValueError, RecursionError) as error:
        raise refused(path, str(error)) from None


def _refuse(text: str) -> float:
    raise ValueError(f"expected finite numbers, got {text}")


def refused(path: Path, why: str) -> OptionError:
    return OptionError(f"cannot read the calibration {path}: {why}; make it anew with flowfast calibrate")


def weights_of(part: Any) -> str:
    """A digest by which a model or reward is known again: of the names, shapes and some numbers of its weights, and of
    its class."""
    found = hashlib.blake2b(type(part).__name__.encode(), digest_size=16)
    named = [each for module in modules_of(part) for each in module.named_parameters()]
    some = [weight.detach().reshape(-1)[:: max(1, math.ceil(weight.numel() / PER_WEIGHT))] for _, weight in named]
    sizes = [len(each) for each in some]
    flat = torch.cat([each.to(named[0][1].device, torch.float32) for each in some]).cpu() if named else torch.empty(0)
    for (name, weight), numbers in zip(named, flat.split(sizes) if named else (), strict=True):  # read in one transfer
        found.update(f"{name} {tuple(weight.shape)}".encode())
        found.update(numbers.numpy().tobytes())
    return found.hexdigest()
