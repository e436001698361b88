"""Integrators: one transition between two points becomes the scalars of x' = A x + B u + C z, z ~ N(0, I).

x and u are the model's, at the `from` time; x' is the model's, at the `to` time. All float64.

| integrator              | interpolants | diffusion                               | parameter             |
|-------------------------|--------------|-----------------------------------------|-----------------------|
| euler-maruyama          | all          | any; square:3 unless given              |                       |
| exponential             | all          | any; square:3 unless given              |                       |
| coefficient-preserving  | all          | none, eta stands for it; "zero": eta 0  | eta in [0, 1]: 0.5    |
| flow-grpo               | linear only  | none, a stands for it; "zero": a = 0    | a >= 0: 0.7           |

Every other pair is refused by name.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from flowfast.errors import OptionError
from flowfast.flow.diffusion import Diffusion, Zero, parse_diffusion
from flowfast.flow.interpolant import Point
from flowfast.flow.option import parse_numbers

_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(40)


class Step(NamedTuple):
    """The scalars of x' = a x + b u + c z."""

    a: float
    b: float
    c: float


class Integrator(ABC):
    """Turns a pair of points into a `Step`. `start.s` > `end.s`; both lie on one path of one model."""

    @abstractmethod
    def step(self, start: Point, end: Point) -> Step: ...


class _Euler(Integrator):
    """x_bar' = x_bar + [u_bar - (g^2 / 2) score] ds + g sqrt(|ds|) z on the path, ds < 0 (arXiv 2503.19385).

    ds < 0 already turns the score term around: the SDE is used as it stands.
    """

    @abstractmethod
    def g_t(self, start: Point) -> float: ...

    def step(self, start: Point, end: Point) -> Step:
        ds = end.s - start.s
        g = self.g_t(start)
        velocity, score = start.velocity, start.score
        a = start.scale + (velocity[0] - g * g / 2.0 * score[0]) * ds
        b = (velocity[1] - g * g / 2.0 * score[1]) * ds
        return Step(a / end.scale, b / end.scale, g * math.sqrt(-ds) / end.scale)


@dataclass(frozen=True)
class EulerMaruyama(_Euler):
    __doc__ = _Euler.__doc__

    diffusion: Diffusion

    def g_t(self, start: Point) -> float:
        return self.diffusion.g_t(start.s, start.path)


@dataclass(frozen=True)
class FlowGRPO(_Euler):
    """Euler-Maruyama on the linear path with g = a sqrt(t / (1 - t)) (Liu et al. 2025, arXiv 2505.05470).

    The denominator vanishes at t = 1; as in the published code the second time of the grid (`ceiling`) stands in for
    t there.
    """

    a: float
    ceiling: float

    def __post_init__(self) -> None:
        if not self.a >= 0:
            raise OptionError(f"integrator flow-grpo needs a >= 0, got {self.a}")

    def g_t(self, start: Point) -> float:
        return self.a * math.sqrt(start.s / (1.0 - min(start.s, self.ceiling)))


def _rotate(start: Point, end: Point, keep: float, fresh: float) -> Step:
    """x' = alpha' x0_hat + sigma' (keep eps_hat + fresh z); x0_hat and eps_hat are the same on every path."""
    x0_hat, eps_hat = start.x0_hat, start.eps_hat
    a = end.alpha_t * x0_hat[0] + end.sigma_t * keep * eps_hat[0]
    b = end.alpha_t * x0_hat[1] + end.sigma_t * keep * eps_hat[1]
    return Step(a, b, end.sigma_t * fresh)


@dataclass(frozen=True)
class Exponential(Integrator):
    """x0_hat frozen over the step: y = (x_bar - alpha x0_hat) / sigma is then an Ornstein-Uhlenbeck process,

        dy = g^2 / (2 sigma^2) y ds + (g / sigma) dw,
        y' = k y + sqrt(1 - k^2) z,    k = exp(-integral of g^2 / (2 sigma^2) |ds|),

    x_bar' = alpha' x0_hat + sigma' y'. The noise keeps its variance whatever the step. With g = 0 it is the Euler
    step of the linear path (DDIM).
    """

    diffusion: Diffusion

    def step(self, start: Point, end: Point) -> Step:
        decay = self._decay(start, end)
        return _rotate(start, end, math.exp(-decay), math.sqrt(-math.expm1(-2.0 * decay)))

    def _decay(self, start: Point, end: Point) -> float:
        """Integral of g^2 / (2 sigma^2) over the step: Gauss-Legendre in log s, split where g has kinks."""
        path = start.path
        cuts = [end.s, *sorted(s for s in self.diffusion.kinks if end.s < s < start.s), start.s]
        total = 0.0
        for low, high in zip(cuts[:-1], cuts[1:], strict=True):
            middle, half = math.log(low * high) / 2.0, math.log(high / low) / 2.0
            for node, weight in zip(_NODES.tolist(), _WEIGHTS.tolist(), strict=True):
                s = math.exp(middle + half * node)
                rate = self.diffusion.g_t(s, path) / path.sigma_t(s)
                total += half * weight * s * rate * rate / 2.0
        return total


@dataclass(frozen=True)
class CoefficientPreserving(Integrator):
    """x' = alpha' x0_hat + sigma' (cos(eta pi / 2) eps_hat + sin(eta pi / 2) z) (Flow-CPS, arXiv 2509.05952).

    eta = 0 is the Euler step of the linear path (DDIM), eta = 1 replaces all the noise (diffusers'
    stochastic_sampling).
    """

    eta: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.eta <= 1.0:
            raise OptionError(f"integrator coefficient-preserving needs eta in [0, 1], got {self.eta}")

    def step(self, start: Point, end: Point) -> Step:
        return _rotate(start, end, math.cos(self.eta * math.pi / 2.0), math.sin(self.eta * math.pi / 2.0))


ODE = CoefficientPreserving(eta=0.0)


def renoise(start: Point, end: Point) -> Step:
    """Up in t, along the forward process: x' = r x + sqrt(sigma'^2 - r^2 sigma^2) z, r = alpha'/alpha; alpha > 0."""
    ratio = end.alpha_t / start.alpha_t
    return Step(ratio, 0.0, math.sqrt(end.sigma_t**2 - (ratio * start.sigma_t) ** 2))


class Combination(NamedTuple):
    """What an integrator goes with: its interpolants (None: all), default g (None: takes none), one parameter."""

    interpolants: tuple[str, ...] | None
    diffusion: str | None
    parameter: str | None
    default: float


COMBINATIONS: dict[str, Combination] = {
    "euler-maruyama": Combination(None, "square:3", None, 0.0),
    "exponential": Combination(None, "square:3", None, 0.0),
    "coefficient-preserving": Combination(None, None, "eta", 0.5),
    "flow-grpo": Combination(("linear",), None, "a", 0.7),
}


def parse_integrator(text: str, *, interpolant: str, diffusion: str | None = None, ceiling: float = 0.9) -> Integrator:
    """The integrator named by "euler-maruyama", "exponential", "coefficient-preserving:0.5" or "flow-grpo:0.7".

    interpolant: the path that is walked, by name; diffusion: g, None for the integrator's default; ceiling: the second
    time of the grid (flow-grpo's clamp). Raises OptionError for unknown names and for pairs outside the table above.
    """
    name, *parts = text.split(":")
    if name not in COMBINATIONS:
        raise OptionError(f"unknown integrator {name!r}; choose one of: {', '.join(COMBINATIONS)}")
    combination = COMBINATIONS[name]
    if len(parts) > (combination.parameter is not None):
        raise OptionError(
            f"integrator {text!r} has {len(parts)} numbers; {name} takes {combination.parameter or 'none'}"
        )
    parameter = [*parse_numbers("integrator", text, parts), combination.default][0]
    if combination.interpolants is not None and interpolant.split(":")[0] not in combination.interpolants:
        others = [other for other, entry in COMBINATIONS.items() if entry.interpolants is None]
        raise OptionError(
            f"integrator {name} works with interpolant {', '.join(combination.interpolants)} only, got "
            f"{interpolant!r}; take one of the integrators {', '.join(others)} there"
        )
    if combination.diffusion is None:
        if diffusion is not None and not isinstance(parse_diffusion(diffusion), Zero):
            raise OptionError(
                f"integrator {name} sets its noise by {combination.parameter} and takes no diffusion, got "
                f'{diffusion!r}; leave diffusion out, or give "zero" for the ODE'
            )
        if name == "coefficient-preserving":
            integrator: Integrator = CoefficientPreserving(parameter)
        else:
            integrator = FlowGRPO(parameter, ceiling)
        return integrator if diffusion is None else ODE
    g = parse_diffusion(diffusion or combination.diffusion)
    return EulerMaruyama(g) if name == "euler-maruyama" else Exponential(g)
