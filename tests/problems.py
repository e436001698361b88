"""Problems with known answers, float64: a Gaussian mixture under any interpolant, and its tilt by a quadratic reward.

x0 ~ sum_k weights_k N(means_k, stds_k^2 I). Then x_t = alpha x0 + sigma eps is a mixture too, so posterior mean,
velocity and score are closed form; exp(reward) with a quadratic reward gives another mixture and its normalising
constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flowfast.flow import Interpolant


@dataclass(frozen=True, eq=False)
class GaussianMixture:
    """weights (K,), means (K, d), stds (K,), all float64. x is (N, d); t a float or (N,)."""

    weights: Tensor
    means: Tensor
    stds: Tensor

    def sample(self, count: int, generator: torch.Generator) -> Tensor:
        component = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        noise = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return self.means[component] + self.stds[component, None] * noise

    def mean(self) -> Tensor:
        return self.weights @ self.means

    def variance(self) -> Tensor:
        """(d,) per coordinate."""
        return self.weights @ (self.means**2 + self.stds[:, None] ** 2) - self.mean() ** 2

    def marginal(self, alpha: float, sigma: float) -> GaussianMixture:
        """The law of alpha x0 + sigma eps."""
        return GaussianMixture(self.weights, alpha * self.means, torch.sqrt((alpha * self.stds) ** 2 + sigma**2))

    def log_density(self, x: Tensor) -> Tensor:
        """(N,)"""
        return torch.logsumexp(self._log_joint(x), dim=1)

    def cdf(self, x: Tensor) -> Tensor:
        """One dimension only: P(x0 <= x) for x (N,)."""
        return torch.special.ndtr((x[:, None] - self.means[:, 0]) / self.stds) @ self.weights

    def x0_hat(self, x: Tensor, t: float | Tensor, path: Interpolant) -> Tensor:
        """E[x0 | x_t = x]."""
        alpha, sigma = _coefficient(path.alpha_t, t, x), _coefficient(path.sigma_t, t, x)
        variance = (alpha * self.stds) ** 2 + sigma**2  # (1 or N, K)
        gain = alpha * self.stds**2 / variance
        squares = ((x[:, None, :] - alpha[..., None] * self.means) ** 2).sum(-1)
        log_joint = torch.log(self.weights) - squares / (2.0 * variance) - x.shape[1] / 2.0 * torch.log(variance)
        posterior = self.means + gain[..., None] * (x[:, None, :] - alpha[..., None] * self.means)
        return (torch.softmax(log_joint, dim=1)[..., None] * posterior).sum(1)

    def eps_hat(self, x: Tensor, t: float | Tensor, path: Interpolant) -> Tensor:
        """E[eps | x_t = x]."""
        alpha, sigma = _coefficient(path.alpha_t, t, x), _coefficient(path.sigma_t, t, x)
        return (x - alpha * self.x0_hat(x, t, path)) / sigma

    def score(self, x: Tensor, t: float | Tensor, path: Interpolant) -> Tensor:
        """Gradient of the log density of x_t."""
        return -self.eps_hat(x, t, path) / _coefficient(path.sigma_t, t, x)

    def velocity(self, x: Tensor, t: float | Tensor, path: Interpolant) -> Tensor:
        """E[dx_t/dt | x_t = x]: what a perfect model of this data predicts."""
        d_alpha, d_sigma = _coefficient(path.d_alpha_t, t, x), _coefficient(path.d_sigma_t, t, x)
        return d_alpha * self.x0_hat(x, t, path) + d_sigma * self.eps_hat(x, t, path)

    def tilt(self, target: Tensor, width: float) -> tuple[GaussianMixture, float]:
        """The law proportional to density * exp(reward), reward = -|x - target|^2 / (2 width^2), target (d,); and
        log E[exp(reward)]."""
        total = self.stds**2 + width**2
        squares = ((self.means - target) ** 2).sum(-1)
        log_weights = (
            torch.log(self.weights)
            - squares / (2.0 * total)
            + self.means.shape[1] / 2.0 * (2.0 * math.log(width) - torch.log(total))
        )
        share = (self.stds**2 / total)[:, None]
        means = self.means + share * (target - self.means)
        tilted = GaussianMixture(torch.softmax(log_weights, 0), means, self.stds * width / torch.sqrt(total))
        return tilted, float(torch.logsumexp(log_weights, 0))

    def _log_joint(self, x: Tensor) -> Tensor:
        squares = ((x[:, None, :] - self.means) ** 2).sum(-1) / self.stds**2
        constant = x.shape[1] * (torch.log(self.stds) + 0.5 * math.log(2.0 * math.pi))
        return torch.log(self.weights) - constant - squares / 2.0


def quadratic_reward(x: Tensor, target: Tensor, width: float) -> Tensor:
    """(N,): the reward of `GaussianMixture.tilt`."""
    return -((x - target) ** 2).sum(-1) / (2.0 * width**2)


def standard_normal() -> GaussianMixture:
    return GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in ([1.0], [[0.0]], [1.0])))


def two_modes() -> GaussianMixture:
    """One dimension, mean 0 and variance 1, so that the usual start N(0, 1) of a VP path has the right two moments."""
    weights, means = [0.7, 0.3], [[-0.6], [1.4]]  # variance of the means: 0.84
    return GaussianMixture(*(torch.tensor(v, dtype=torch.float64) for v in (weights, means, [0.4, 0.4])))


def two_dimensions() -> GaussianMixture:
    weights = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    means = torch.tensor([[1.0, 0.0], [-1.0, 1.0], [0.0, -1.5]], dtype=torch.float64)
    return GaussianMixture(weights, means, torch.tensor([0.3, 0.4, 0.2], dtype=torch.float64))


def _coefficient(function: Callable[[float], float], t: float | Tensor, x: Tensor) -> Tensor:
    """A coefficient at one time as (1, 1), at a time per row as (N, 1)."""
    times = [t] if isinstance(t, float) else t.tolist()
    return torch.tensor([function(time) for time in times], dtype=x.dtype)[:, None]
