"""Diffusion coefficients g(s) of dx = [u - (g^2 / 2) score] ds + g dw, in the time s of the path that is walked.

Formulas and names follow arXiv 2503.19385. Each takes a norm, 1 unless given:
`square:3`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from flowfast.errors import OptionError
from flowfast.flow.interpolant import Interpolant
from flowfast.flow.option import parse_option


class Diffusion(ABC):
    """g(s) >= 0 for s in (0, 1], per square root of path time."""

    @abstractmethod
    def g_t(self, s: float, path: Interpolant) -> float: ...

    @property
    def kinks(self) -> tuple[float, ...]:
        """Times between which g is smooth on the scale of the gap; quadrature is split there."""
        return ()


@dataclass(frozen=True)
class Zero(Diffusion):
    """g = 0: the ODE, whatever the integrator."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return 0.0


@dataclass(frozen=True)
class _Normed(Diffusion):
    norm: float = 1.0

    def __post_init__(self) -> None:
        if not self.norm >= 0:
            raise OptionError(f"the norm of a diffusion coefficient must be >= 0, got {self.norm}")


@dataclass(frozen=True)
class Constant(_Normed):
    """g = norm."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm


@dataclass(frozen=True)
class Sigma(_Normed):
    """g = norm * sigma_s of the path."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * path.sigma_t(s)


@dataclass(frozen=True)
class LinearInTime(_Normed):
    """g = norm * s."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * s


@dataclass(frozen=True)
class Square(_Normed):
    """g = norm * s^2 (the paper's choice, norm 3)."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * s * s


@dataclass(frozen=True)
class Sine(_Normed):
    """g = norm * sin(pi s / 2)."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * math.sin(math.pi / 2.0 * s)


@dataclass(frozen=True)
class Exponential(_Normed):
    """g = norm * exp(-((s - 1) / width)^2); width 0.1 unless given: `exp:3:0.2`."""

    width: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.width > 0:
            raise OptionError(f"the width of diffusion exp must be > 0, got {self.width}")

    def g_t(self, s: float, path: Interpolant) -> float:
        distance = (s - 1.0) / self.width
        return self.norm * math.exp(-distance * distance)

    @property
    def kinks(self) -> tuple[float, ...]:
        return (1.0 - self.width, 1.0 - 3.0 * self.width, 1.0 - 6.0 * self.width)


@dataclass(frozen=True)
class Tangent(_Normed):
    """g = norm * tan(pi min(s, 0.95) / 2)."""

    cap: ClassVar[float] = 0.95

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * math.tan(math.pi / 2.0 * min(s, self.cap))

    @property
    def kinks(self) -> tuple[float, ...]:
        return (self.cap,)


@dataclass(frozen=True)
class Clipped(_Normed):
    """g = norm * max(0, 2 s - 1): no noise in the second half."""

    def g_t(self, s: float, path: Interpolant) -> float:
        return self.norm * max(0.0, 2.0 * s - 1.0)

    @property
    def kinks(self) -> tuple[float, ...]:
        return (0.5,)


DIFFUSIONS: dict[str, type[Diffusion]] = {
    "zero": Zero,
    "constant": Constant,
    "sigma": Sigma,
    "linear": LinearInTime,
    "square": Square,
    "sin": Sine,
    "exp": Exponential,
    "tan": Tangent,
    "clipped": Clipped,
}


def parse_diffusion(text: str) -> Diffusion:
    """The coefficient written as "zero", "square:3", "exp:3:0.2" and the like. Raises OptionError."""
    return parse_option("diffusion", text, DIFFUSIONS)
