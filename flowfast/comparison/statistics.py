"""Means over prompts and seeds with 95 % intervals, and paired differences from best-of-n."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowfast.comparison.design import Arm, Comparison

BASELINE = "bon"
RESAMPLES = 10_000


def summarise(comparison: Comparison, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm: means over prompts and seeds with 95 % intervals, and the paired difference from best-of-n.

    Seeds of one prompt are not independent, so prompts are what the bootstrap draws; the same draws for every arm.
    The baseline of an arm is best-of-n with the same budget on the first path of --interpolants.
    """
    draws = np.random.default_rng(0).multinomial(
        len(comparison.prompts), np.full(len(comparison.prompts), 1 / len(comparison.prompts)), size=RESAMPLES
    ) / len(comparison.prompts)
    wanted = set(comparison.jobs())
    lines = [line for line in lines if (Arm(*line["arm"]), line["seed"], tuple(line["prompts"])) in wanted]
    rows = []
    for arm in comparison.arms():
        own = [line for line in lines if Arm(*line["arm"]) == arm]
        baseline = arm._replace(method=BASELINE, interpolant=comparison.interpolants[0])
        base = [line for line in lines if Arm(*line["arm"]) == baseline]
        seconds = [line["seconds"]["total"] / len(line["prompts"]) for line in own]
        values = {what: by_prompt(comparison, own, what) for what in ("reward", "heldout")}
        against = {what: by_prompt(comparison, base, what) for what in ("reward", "heldout")} if base else None
        rows.append(
            {
                **arm._asdict(),
                "prompts": len(comparison.prompts),
                "seeds": comparison.seeds,
                "reward": estimate(values["reward"], draws),
                "heldout": estimate(values["heldout"], draws),
                "difference": None
                if against is None or arm == baseline
                else {
                    what: None if value is None else estimate(value - against[what], draws)
                    for what, value in values.items()
                },
                "nfe": float(np.mean([n for line in own for n in line["nfe"]])),
                "unspent": float(np.mean([n for line in own for n in line["unspent"]])),
                "seconds_per_prompt": float(
                    np.median([line["seconds"]["total"] / len(line["prompts"]) for line in own])
                ),
                "worst_seconds_per_prompt": max(seconds),
            }
        )
    return rows


def by_prompt(comparison: Comparison, lines: Sequence[dict[str, Any]], what: str) -> Any:
    """float64 (prompts,): the mean over seeds of one arm; None where it was not measured."""
    found: dict[str, list[float]] = {prompt: [] for prompt in comparison.prompts}
    for line in lines:
        if line[what] is None:
            return None
        for prompt, value in zip(line["prompts"], line[what], strict=True):
            found[prompt].append(value)
    return np.array([np.mean(found[prompt]) for prompt in comparison.prompts], dtype=np.float64)


def estimate(values: Any, draws: np.ndarray) -> dict[str, float] | None:
    """Mean of values (P,) and its 95 % percentile interval over draws (R, P), each row the weights of one resample."""
    if values is None:
        return None
    low, high = np.quantile(draws @ values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}
