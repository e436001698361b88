"""Interpolants x_t = alpha_t x0 + sigma_t eps, and points at which one path is seen from another.

Time runs from t = 1 (noise) to t = 0 (data). Every pair (alpha, sigma) with the same ratio rho = alpha / sigma
describes the same noisy image up to a scale, so a path can be walked with a model trained on another one (Kim et al.
2025, arXiv 2503.19385): t_s = rho^-1(rho_bar(s)), x_bar = c x with c = sigma_bar_s / sigma_t.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from flowfast.errors import OptionError
from flowfast.flow.option import parse_option


class Interpolant(ABC):
    """A noising path, in float64 scalars. `sigma_t` > 0 for t in (0, 1]; derivatives are with respect to t.

    Derivatives may be infinite at t = 0, where no model is ever evaluated.
    """

    @abstractmethod
    def alpha_t(self, t: float) -> float: ...

    @abstractmethod
    def sigma_t(self, t: float) -> float: ...

    @abstractmethod
    def d_alpha_t(self, t: float) -> float: ...

    @abstractmethod
    def d_sigma_t(self, t: float) -> float: ...

    @abstractmethod
    def _time_at(self, rho: float) -> float:
        """The inverse of `rho` for rho(1) < rho < infinity, in closed form."""

    def rho(self, t: float) -> float:
        """alpha / sigma at t in (0, 1]; falls as t rises."""
        return self.alpha_t(t) / self.sigma_t(t)

    def rho_inverse(self, rho: float) -> float:
        """The t in (0, 1] at which alpha / sigma = rho; a ratio that this path never reaches, below rho(1), gives 1."""
        return 1.0 if rho <= self.rho(1.0) else self._time_at(rho)

    def linear_time(self, t: float) -> float:
        """The linear path's time of the same ratio, sigma / (alpha + sigma), in (0, 1]."""
        alpha, sigma = self.alpha_t(t), self.sigma_t(t)
        return sigma / (alpha + sigma)

    def from_linear_time(self, linear_time: float) -> float:
        """The inverse of `linear_time` for linear_time in (0, 1]; clamped to 1 as in `rho_inverse`."""
        return self.rho_inverse((1.0 - linear_time) / linear_time)


@dataclass(frozen=True)
class Linear(Interpolant):
    """alpha = 1 - t, sigma = t (rectified flow: FLUX, SD3, Wan)."""

    def alpha_t(self, t: float) -> float:
        return 1.0 - t

    def sigma_t(self, t: float) -> float:
        return t

    def d_alpha_t(self, t: float) -> float:
        return -1.0

    def d_sigma_t(self, t: float) -> float:
        return 1.0

    def _time_at(self, rho: float) -> float:
        return 1.0 / (1.0 + rho)

    # Exact, where the way through rho would round.
    def linear_time(self, t: float) -> float:
        return t

    def from_linear_time(self, linear_time: float) -> float:
        return linear_time


@dataclass(frozen=True)
class VariancePreserving(Interpolant):
    """alpha = exp(-T/2), sigma = sqrt(1 - exp(-T)), T = (b1 - b0) t^2 / 2 + b0 t (Song et al. 2021, arXiv 2011.13456).

    alpha(1) = exp(-(b0 + b1) / 4) > 0: this path never quite reaches pure noise.
    """

    b0: float = 0.1
    b1: float = 20.0

    def __post_init__(self) -> None:
        if not (0 < self.b0 <= 200 and 0 < self.b1 <= 200):
            raise OptionError(f"interpolant vp needs b0 and b1 in (0, 200], got b0 = {self.b0}, b1 = {self.b1}")

    def _exponent(self, t: float) -> float:
        return (self.b1 - self.b0) * t * t / 2.0 + self.b0 * t

    def _d_exponent(self, t: float) -> float:
        return (self.b1 - self.b0) * t + self.b0

    def alpha_t(self, t: float) -> float:
        return math.exp(-self._exponent(t) / 2.0)

    def sigma_t(self, t: float) -> float:
        return math.sqrt(-math.expm1(-self._exponent(t)))

    def d_alpha_t(self, t: float) -> float:
        return -self._d_exponent(t) / 2.0 * self.alpha_t(t)

    def d_sigma_t(self, t: float) -> float:
        return self._d_exponent(t) / 2.0 * math.exp(-self._exponent(t)) / self.sigma_t(t)

    def _time_at(self, rho: float) -> float:
        exponent = math.log1p(rho**-2)
        # The root of (b1 - b0) t^2 / 2 + b0 t = exponent, in the form that does not cancel (and allows b1 = b0).
        return 2.0 * exponent / (self.b0 + math.sqrt(self.b0**2 + 2.0 * (self.b1 - self.b0) * exponent))


@dataclass(frozen=True)
class Trigonometric(Interpolant):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2) (Albergo and Vanden-Eijnden 2023, arXiv 2209.15571)."""

    def alpha_t(self, t: float) -> float:
        # cos(pi t / 2) as a sine, which is exactly 0 at t = 1.
        return math.sin(math.pi / 2.0 * (1.0 - t))

    def sigma_t(self, t: float) -> float:
        return math.sin(math.pi / 2.0 * t)

    def d_alpha_t(self, t: float) -> float:
        return -math.pi / 2.0 * self.sigma_t(t)

    def d_sigma_t(self, t: float) -> float:
        return math.pi / 2.0 * self.alpha_t(t)

    def _time_at(self, rho: float) -> float:
        return 2.0 / math.pi * math.atan2(1.0, rho)


@dataclass(frozen=True)
class LinearVariancePreserving(Interpolant):
    """alpha = 1 - t, sigma = sqrt(1 - alpha^2) (linear-VP; Lipman et al. 2024, arXiv 2412.06264)."""

    def alpha_t(self, t: float) -> float:
        return 1.0 - t

    def sigma_t(self, t: float) -> float:
        return math.sqrt(t * (2.0 - t))

    def d_alpha_t(self, t: float) -> float:
        return -1.0

    def d_sigma_t(self, t: float) -> float:
        return (1.0 - t) / self.sigma_t(t)

    def _time_at(self, rho: float) -> float:
        # 1 - rho / sqrt(1 + rho^2), without the cancellation at large rho.
        return -math.expm1(-0.5 * math.log1p(rho**-2))


@dataclass(frozen=True)
class Polynomial(Interpolant):
    """alpha = 1 - t^n, sigma = t^n (Lipman et al. 2024, arXiv 2412.06264); n in [0.1, 100]."""

    n: float = 2.0

    def __post_init__(self) -> None:
        if not 0.1 <= self.n <= 100:
            raise OptionError(f"interpolant polynomial needs n in [0.1, 100], got {self.n}")

    def alpha_t(self, t: float) -> float:
        return 1.0 - self.sigma_t(t)

    def sigma_t(self, t: float) -> float:
        return float(t**self.n)

    def d_alpha_t(self, t: float) -> float:
        return -self.d_sigma_t(t)

    def d_sigma_t(self, t: float) -> float:
        return float(self.n * t ** (self.n - 1.0))

    def _time_at(self, rho: float) -> float:
        return float((1.0 + rho) ** (-1.0 / self.n))


INTERPOLANTS: dict[str, type[Interpolant]] = {
    "linear": Linear,
    "vp": VariancePreserving,
    "trigonometric": Trigonometric,
    "linear-vp": LinearVariancePreserving,
    "polynomial": Polynomial,
}


def parse_interpolant(text: str) -> Interpolant:
    """The path written as "linear", "vp", "vp:0.1:20", "linear-vp", "polynomial:2" and the like. Raises OptionError."""
    return parse_option("interpolant", text, INTERPOLANTS)


Pair = tuple[float, float]  # a linear combination of the model's (x, u): the factor on x, the factor on u


@dataclass(frozen=True)
class Point:
    """Time `s` of `path`, seen from a model that was trained on the path `model`. All float64 scalars.

    The posterior means x0_hat = E[x0 | x] and eps_hat = E[eps | x] do not depend on the path, so they carry everything
    from one path to another: u_bar = d_alpha_bar x0_hat + d_sigma_bar eps_hat is the same as
    (c'/c) x_bar + c t' u(x_bar / c, t) and has no singular end. Every `Pair` acts on the model's own x and u.
    """

    model: Interpolant
    path: Interpolant
    s: float

    @property
    def t(self) -> float:
        """The model's time; 1 where the model never reaches the path's ratio (Song's VP has none below 0.0066)."""
        return self.s if self.model == self.path else self.model.rho_inverse(self.path.rho(self.s))

    @property
    def linear_time(self) -> float:
        return self.model.linear_time(self.t)

    @property
    def alpha_t(self) -> float:
        return self.model.alpha_t(self.t)

    @property
    def sigma_t(self) -> float:
        return self.model.sigma_t(self.t)

    @property
    def scale(self) -> float:
        """c in x_bar = c x."""
        return 1.0 if self.model == self.path else self.path.sigma_t(self.s) / self.sigma_t

    @property
    def _determinant(self) -> float:
        t, model = self.t, self.model
        return model.d_alpha_t(t) * model.sigma_t(t) - model.alpha_t(t) * model.d_sigma_t(t)

    @property
    def x0_hat(self) -> Pair:
        """(D, E) of x0_hat = D x + E u; (1, -t) on the linear path."""
        return -self.model.d_sigma_t(self.t) / self._determinant, self.sigma_t / self._determinant

    @property
    def eps_hat(self) -> Pair:
        """eps_hat = -sigma score; (1, 1 - t) on the linear path."""
        return self.model.d_alpha_t(self.t) / self._determinant, -self.alpha_t / self._determinant

    @property
    def velocity(self) -> Pair:
        """u_bar = dx_bar / ds, in the path's coordinates."""
        return _combine(self.path.d_alpha_t(self.s), self.x0_hat, self.path.d_sigma_t(self.s), self.eps_hat)

    @property
    def score(self) -> Pair:
        """Gradient of the log density of x_bar, in the path's coordinates."""
        return _combine(0.0, self.x0_hat, -1.0 / self.path.sigma_t(self.s), self.eps_hat)

    @property
    def velocity_of_score(self) -> float:
        """du/dscore = alpha' sigma^2 / alpha - sigma' sigma at a given x, in the model's coordinates; -t / (1 - t) on
        the linear path.

        A score that is larger by d moves eps_hat by -sigma d and so x0_hat by (sigma^2 / alpha) d. 0 at alpha = 0, for
        there x0_hat does not depend on x, and no gradient through it says anything; from alpha = 1e-6 on float32 can
        tell the dependence from rounding.
        """
        return self.sigma_t * self._determinant / self.alpha_t if self.alpha_t > 1e-6 else 0.0


def _combine(a: float, first: Pair, b: float, second: Pair) -> Pair:
    return a * first[0] + b * second[0], a * first[1] + b * second[1]
