"""Sampling steps as the papers write them, in the coordinates of the path that is walked: the oracle for the table."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from flowfast.flow import Diffusion, Interpolant
from tests.problems import GaussianMixture


@dataclass(frozen=True)
class Converted:
    """A path at time s, walked with a perfect model of `mixture` that knows only the path `model`."""

    mixture: GaussianMixture
    model: Interpolant
    path: Interpolant
    s: float

    @property
    def t(self) -> float:
        return self.s if self.model == self.path else self.model.rho_inverse(self.path.rho(self.s))

    @property
    def c(self) -> float:
        return self.path.sigma_t(self.s) / self.model.sigma_t(self.t)

    def _d_rho(self, interpolant: Interpolant, t: float) -> float:
        alpha, sigma = interpolant.alpha_t(t), interpolant.sigma_t(t)
        return (interpolant.d_alpha_t(t) * sigma - alpha * interpolant.d_sigma_t(t)) / sigma**2

    def velocity(self, x_bar: Tensor) -> Tensor:
        """u_bar = (c'/c) x_bar + c t' u(x_bar / c, t), with t' from rho(t_s) = rho_bar(s)."""
        t, c = self.t, self.c
        d_t = self._d_rho(self.path, self.s) / self._d_rho(self.model, t)
        d_c = (self.path.d_sigma_t(self.s) - c * self.model.d_sigma_t(t) * d_t) / self.model.sigma_t(t)
        return d_c / c * x_bar + c * d_t * self.mixture.velocity(x_bar / c, t, self.model)

    def score(self, x_bar: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = self.coefficients
        return (alpha * self.velocity(x_bar) - d_alpha * x_bar) / (d_alpha * sigma - alpha * d_sigma) / sigma

    def x0_hat(self, x_bar: Tensor) -> Tensor:
        alpha, sigma, d_alpha, d_sigma = self.coefficients
        return (sigma * self.velocity(x_bar) - d_sigma * x_bar) / (d_alpha * sigma - alpha * d_sigma)

    @property
    def coefficients(self) -> tuple[float, float, float, float]:
        path, s = self.path, self.s
        return path.alpha_t(s), path.sigma_t(s), path.d_alpha_t(s), path.d_sigma_t(s)


def euler_maruyama(
    start: Converted, end: Converted, x: Tensor, z: Tensor | float, g: float, sign: float = 1.0
) -> Tensor:
    """dx = [u - (g^2 / 2) score] dt + g dw, dt < 0. sign = -1 is the mutant that flips the score's sign as well."""
    dt = end.s - start.s
    drift = start.velocity(x) - sign * g**2 / 2.0 * start.score(x)
    return x + drift * dt + g * math.sqrt(-dt) * z


def exponential(start: Converted, end: Converted, x: Tensor, z: Tensor | float, diffusion: Diffusion) -> Tensor:
    """x' = alpha' x0_hat + sigma' (k y + sqrt(1 - k^2) z), k = exp(-integral g^2 / (2 sigma^2))."""
    alpha, sigma, _, _ = start.coefficients
    x0_hat = start.x0_hat(x)
    y = (x - alpha * x0_hat) / sigma
    k = math.exp(-decay(start.path, diffusion, start.s, end.s))
    return end.coefficients[0] * x0_hat + end.coefficients[1] * (k * y + math.sqrt(1.0 - k * k) * z)


def decay(path: Interpolant, diffusion: Diffusion, high: float, low: float, panels: int = 60) -> float:
    """Integral of g^2 / (2 sigma^2) by Simpson's rule, between kinks."""
    cuts = [low, *sorted(s for s in diffusion.kinks if low < s < high), high]
    total = 0.0
    for a, b in zip(cuts[:-1], cuts[1:], strict=True):
        times = np.linspace(a, b, 2 * panels + 1).tolist()
        values = np.array([(diffusion.g_t(s, path) / path.sigma_t(s)) ** 2 / 2.0 for s in times])
        total += (
            float(values[0] + values[-1] + 4 * values[1::2].sum() + 2 * values[2:-1:2].sum()) * (b - a) / (6 * panels)
        )
    return total


def coefficient_preserving(start: Converted, end: Converted, x: Tensor, z: Tensor | float, eta: float) -> Tensor:
    """std = sigma' sin(eta pi / 2), mean = alpha' x0_hat + sqrt(sigma'^2 - std^2) eps_hat (Flow-CPS)."""
    alpha, sigma, _, _ = start.coefficients
    x0_hat = start.x0_hat(x)
    eps_hat = (x - alpha * x0_hat) / sigma
    std = end.coefficients[1] * math.sin(eta * math.pi / 2.0)
    return end.coefficients[0] * x0_hat + math.sqrt(end.coefficients[1] ** 2 - std**2) * eps_hat + std * z


def flow_grpo(start: Converted, end: Converted, x: Tensor, z: Tensor | float, a: float, second: float) -> Tensor:
    """x + [u + g^2 / (2 t) (x + (1 - t) u)] dt + g sqrt(-dt) z, g = a sqrt(t / (1 - min(t, second)))."""
    t, dt = start.s, end.s - start.s
    std = a * math.sqrt(t / (1.0 - (second if t > second else t)))
    u = start.velocity(x)
    return x + (u + std**2 / (2.0 * t) * (x + (1.0 - t) * u)) * dt + std * math.sqrt(-dt) * z


def propagate(density: Tensor, mean: Tensor, std: float, x: Tensor) -> Tensor:
    """One transition of a density on the uniform grid x (n,): integral of density(a) N(x; mean(a), std^2) da. The
    trapezoid rule converges faster than any power while std is not below the spacing."""
    dx = float(x[1] - x[0])
    assert std > 0.9 * dx, "grid too coarse for this much noise"
    kernel = torch.exp(-(((x[:, None] - mean) / std) ** 2) / 2.0) / (std * math.sqrt(2.0 * math.pi))
    return kernel @ density * dx
