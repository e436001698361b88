"""Best-of-n, `prune` with its own cuts and `prune` with chosen cuts at equal cost: what each one's image is worth."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np

from bench.studies.flux_pruning.bank import Bank
from bench.studies.flux_pruning.halving import (
    Cuts,
    Floats,
    Ints,
    alive,
    calibrated,
    correlations,
    cost,
    draw,
    expected_best,
    most,
    winners,
)
from flowfast.bounds import Within
from flowfast.comparison.statistics import RESAMPLES, estimate
from flowfast.config import Config
from flowfast.methods.prune import Prune

SAMPLES = (5, 10, 20)
"""Of best-of-n: what they cost is what the others may spend."""
BASELINE, OWN, CHOSEN = "best-of-n", "prune", "calibrated prune"
HELD_OUT = "held out"
"""Mean of what the rewards say that did not select."""


class Settings(Config):
    """What the replay assumes."""

    verification: Annotated[float, Within(0, 1000)] = 0.12
    """Steps that decoding an image and scoring it cost.

    In TTSnap's README: 1.2 of 9.9 TFLOPs. PyTorch's flop counter gives .117 for FLUX's decoder at 512 x 512 and .016
    for the image tower of a CLIP-H, as PickScore and HPSv2 have."""
    draws: Annotated[int, Within(1, 2000)] = 1000
    """Random draws of each reported prompt's images."""
    tuning_draws: Annotated[int, Within(1, 1000)] = 64
    """The same of each prompt on which cuts are chosen."""
    seed: Annotated[int, Within(0, 2**63 - 1)] = 0
    """Of the draws."""


def study(bank: Bank, times: list[float], settings: Settings) -> Iterator[dict[str, Any]]:
    """A row for each reward that selects, each number of samples and each arm. `as_good_as`: the samples with which
    best-of-n has the row's value by the reward that selects, between two whole numbers if need be."""
    tuning, reported = bank.half(0), bank.half(1)
    P, N, T = reported.shape
    tuning_orders = draw(tuning.shape[0], N, settings.tuning_draws, settings.seed)
    orders = draw(P, N, settings.draws, settings.seed + 1)
    resamples = np.random.default_rng(0).multinomial(P, np.full(P, 1 / P), size=RESAMPLES) / P
    own = tuple(Prune().cuts(times))
    for name in bank.rewards:
        curve = [float(expected_best(reported.finals[name], n).mean()) for n in range(1, N + 1)]
        for n in SAMPLES:
            budget = cost((), n, T, settings.verification)
            chosen = calibrated(
                tuning.keys[name], tuning.finals[name].ravel(), tuning_orders, budget, settings.verification
            )
            baseline: dict[str, Floats] = {}
            for arm, cuts in ((BASELINE, ()), (OWN, own), (CHOSEN, chosen)):
                images = most(cuts, budget, N, T, settings.verification)
                values = verdicts(reported, name, orders, cuts, images)
                baseline = baseline or values
                yield {
                    "selects": name,
                    "n": n,
                    "arm": arm,
                    "times": [times[cut] for cut, _ in cuts],
                    "shares": [share for _, share in cuts],
                    "images": alive(cuts, images),
                    "cost": cost(cuts, images, T, settings.verification),
                    "budget": budget,
                    "value": {by: estimate(each, resamples) for by, each in values.items()},
                    "difference": {by: estimate(each - baseline[by], resamples) for by, each in values.items()},
                    "as_good_as": float(np.interp(values[name].mean(), curve, range(1, N + 1))),
                }


def verdicts(bank: Bank, name: str, orders: Ints, cuts: Cuts, n: int) -> dict[str, Floats]:
    """(P,) by each reward, and by those held out: what it says of the image that the reward `name` chose, mean over
    draws."""
    image = winners(bank.keys[name], orders, cuts, n)
    found = {by: final.ravel()[image].reshape(len(final), -1).mean(1) for by, final in bank.finals.items()}
    return {**found, HELD_OUT: np.mean([each for by, each in found.items() if by != name], axis=0)}


def rank_correlations(bank: Bank) -> dict[str, list[float]]:
    """By the reward's name, after each step, over all prompts."""
    return {name: correlations(values).tolist() for name, values in bank.rewards.items()}
