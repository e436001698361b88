"""Intervals and differences: paired and drawn by prompt."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flowfast.comparison.design import Arm, Comparison
from flowfast.comparison.statistics import RESAMPLES, estimate, summarise


def line_of(arm: Arm, seed: int, prompts: tuple[str, ...], reward: list[float], heldout: list[float]) -> dict[str, Any]:
    costs = {"nfe": [10] * len(prompts), "unspent": [0] * len(prompts), "seconds": {"total": 2.0}}
    return {"arm": list(arm), "seed": seed, "prompts": list(prompts), "reward": reward, "heldout": heldout, **costs}


def test_differences_are_paired_by_prompt() -> None:
    """Two methods whose rewards differ by 1 on every prompt, prompts by far more: the difference is certain."""
    prompts = tuple(f"prompt {i}" for i in range(50))
    comparison = Comparison(prompts, methods=("bon", "rbf"), budgets=(10,), seeds=2, chunk=50)
    rng = np.random.default_rng(3)
    base = rng.normal(0, 30, 50)
    lines = []
    for arm in comparison.arms():
        for seed in range(2):
            gain = 1.0 if arm.method == "rbf" else 0.0
            lines.append(line_of(arm, seed, prompts, list(base + gain + seed), list(np.zeros(50))))
    bon, rbf = summarise(comparison, lines)
    assert bon["difference"] is None
    difference = rbf["difference"]["reward"]
    assert difference["mean"] == pytest.approx(1)
    assert difference["high"] - difference["low"] < 1e-9
    assert rbf["reward"]["high"] - rbf["reward"]["low"] > 5
    assert rbf["seconds_per_prompt"] == pytest.approx(2 / 50)


def interval_width(values: np.ndarray, rng: np.random.Generator) -> float:
    draws = rng.multinomial(len(values), np.full(len(values), 1 / len(values)), size=RESAMPLES) / len(values)
    found = estimate(values, draws)
    assert found is not None
    return found["high"] - found["low"]


def test_intervals_are_clustered_by_prompt() -> None:
    """Seeds that all agree add nothing. The mutant that draws (prompt, seed) pairs instead of prompts is too sure."""
    rng = np.random.default_rng(0)
    by_prompt = rng.binomial(1, 0.4, 100).astype(float)
    clustered = interval_width(by_prompt, np.random.default_rng(1))
    assert clustered == pytest.approx(2 * 1.96 * by_prompt.std() / 10, rel=0.1)
    mutant = interval_width(np.repeat(by_prompt, 3), np.random.default_rng(1))
    assert mutant < 0.7 * clustered
