"""Banks of rewards with a known law, and the routes of a small flow that go with them."""

from __future__ import annotations

from typing import Any

import numpy as np

from flowfast.calibration.bank import Bank, BankPath, weights_of
from flowfast.calibration.choose import Route, options_of, passes_of
from flowfast.config import SearchParams, make
from flowfast.resolve import Resolved, resolve
from tests.toys import GaussianFlow, NearTarget


def walked(steps: int, flow: Any = None, **options: Any) -> Resolved:
    """The plain ODE in so many steps, the last of which finishes the sample."""
    times = ",".join(f"{time:.6f}" for time in np.linspace(1, 0.1, steps))
    own = {"method": "bon", "grid": f"linear-times:{times}"}
    return resolve(flow or GaussianFlow(), make(SearchParams, own | options))


def path_of(rewards: np.ndarray, **options: Any) -> BankPath:
    """Of the flow's own path in as many steps as the rewards (P, n, T) have."""
    resolved = walked(rewards.shape[2], **options)
    times = tuple(map(float, resolved.schedule.linear_time))
    found = {"linear_times": times, "passes": tuple(passes_of(resolved)), "rewards": rewards.tolist()}
    return BankPath(options=options_of(resolved), **found)


def route_of(rewards: np.ndarray, **options: Any) -> Route:
    return Route(path_of(rewards, **options), walked(rewards.shape[2], **options))


def bank_of(*paths: BankPath, flow: Any = None, reward: Any = None, **other: Any) -> Bank:
    flow, reward = flow or GaussianFlow(), reward or NearTarget()
    facts: dict[str, Any] = {
        "model": "toy",
        "model_weights": weights_of(flow),
        "reward": reward.name,
        "reward_weights": weights_of(reward),
        "prompts": tuple(f"prompt {k}" for k in range(len(paths[0].rewards))),
        "seed": 0,
        "seconds_row": 0.01,
        "seconds_decode": 0.001,
        "seconds_reward": 0.002,
        "paths": paths,
    }
    return Bank(**facts | other)


def walk(P: int, n: int, sees: list[float], seed: int = 0) -> np.ndarray:
    """Normal rewards (P, n, T) whose correlation with the final one is sees[k] after transition k."""
    rng = np.random.default_rng(seed)
    final = rng.standard_normal((P, n, 1))
    rho = np.array(sees)
    return rho * final + np.sqrt(1 - rho**2) * rng.standard_normal((P, n, len(sees)))
