"""Best-of-n and pruned best-of-n on images that were all drawn before, with their reward after every step: what would
each have handed out? Rewards (P, N, T) are those of P prompts, N images each, T steps.

An image costs its steps and a verification (a decode and a reward) wherever it is compared: at each cut, and at the
end. Costs are in steps. Images have numbers, 0 .. P N - 1, prompt by prompt.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterator
from functools import cache
from math import comb

import numpy as np
from numpy.typing import NDArray

from flowfast.methods.prune import survivors

Cuts = tuple[tuple[int, float], ...]
"""(step from 0, share of all images that goes on after it), in order, as `Prune.cuts` has them; none: best-of-n."""
Floats = NDArray[np.floating]
Ints = NDArray[np.integer]

SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.8)
"""What may go on after a cut, where the best cuts are looked for."""


def alive(cuts: Cuts, n: int) -> list[int]:
    """Images from the beginning, and after each cut."""
    return [n, *(survivors(n, share) for _, share in cuts)]


def cost(cuts: Cuts, n: int, steps: int, verification: float) -> float:
    """Of n images, in steps."""
    cuts = cuts if n >= 3 else ()
    ends = [*(cut + 1 for cut, _ in cuts), steps]
    counted = zip(alive(cuts, n), [0, *ends[:-1]], ends, strict=True)
    return sum(count * (end - start + verification) for count, start, end in counted)


def most(cuts: Cuts, budget: float, images: int, steps: int, verification: float) -> int:
    """The largest number of images, from 1 to `images`, that costs no more than the budget."""

    def paid(numbers: range) -> int:
        return bisect_right(numbers, budget + 1e-9, key=lambda n: cost(cuts, n, steps, verification))

    cut = paid(range(3, images + 1))  # 2 without a cut may cost more than 3
    return 2 + cut if cut else paid(range(1, 3))


def draw(prompts: int, images: int, draws: int, seed: int) -> Ints:
    """(P D, N): numbers of a prompt's images in D random orders a prompt. Who draws n images has the first n of an
    order, so that all methods draw the same ones."""
    numbers = np.arange(prompts * images).reshape(prompts, images)
    return np.random.default_rng(seed).permuted(numbers.repeat(draws, axis=0), axis=1)


def keys_of(rewards: Floats) -> Ints:
    """(T, P N): the rank among a prompt's rewards after a step, and the image's number in the lower half, so that a
    sorted key tells whose it is."""
    P, N, T = rewards.shape
    ranks = rewards.argsort(1, kind="stable").argsort(1)
    return (ranks << 32 | np.arange(P * N).reshape(P, N, 1)).reshape(P * N, T).T.copy()


def best(keys: Ints, live: Ints, count: int) -> Ints:
    """(R, count): of the images `live` (R, n) those with the highest keys (P N,), the best first."""
    found = keys[live]
    found.sort(axis=1)
    return found[:, : -count - 1 : -1] & 0xFFFFFFFF


def winners(keys: Ints, orders: Ints, cuts: Cuts, n: int) -> Ints:
    """(R,): the image that comes out of each draw of n."""
    live = orders[:, :n]
    for (cut, _), count in zip(cuts, alive(cuts, n)[1:], strict=True):
        live = best(keys[cut], live, count)
    return best(keys[-1], live, 1)[:, 0]


def pairs_of_cuts(steps: int) -> Iterator[Cuts]:
    """Every two cuts before the last step, the later one last to change, with every two of SHARES."""
    for first, second in itertools.combinations(range(steps - 1), 2):
        for less, more in itertools.combinations(SHARES, 2):
            yield (first, more), (second, less)


def calibrated(keys: Ints, final: Floats, orders: Ints, budget: float, verification: float) -> Cuts:
    """Of every two cuts those with the highest mean of `final` (P N,), what comes out being worth that, each with as
    many images as the budget pays. Equal ones: the earlier cuts."""
    steps, images = len(keys), orders.shape[1]

    @cache
    def ranked(cut: int, n: int) -> Ints:
        return best(keys[cut], orders[:, :n], n)

    @cache
    def value(first: int, second: int, n: int, kept: int, finished: int) -> float:
        live = best(keys[second], ranked(first, n)[:, :kept], finished)
        return float(final[best(keys[-1], live, 1)].mean())

    found: list[tuple[float, Cuts]] = []
    for _, later in itertools.groupby(pairs_of_cuts(steps), key=lambda cuts: cuts[0][0]):
        for cuts in later:
            n = most(cuts, budget, images, steps, verification)
            found.append((value(cuts[0][0], cuts[1][0], *alive(cuts, n)), cuts))
        ranked.cache_clear()  # only of one first cut: they are large
    return max(found, key=lambda pair: pair[0])[1]


def expected_best(values: Floats, n: int) -> Floats:
    """(P,): the expected maximum of n of the N values (P, N), drawn without putting back: the i-th smallest is the
    maximum of C(i - 1, n - 1) of C(N, n) sets."""
    N = values.shape[1]
    return np.sort(values, axis=1) @ np.array([comb(i, n - 1) / comb(N, n) for i in range(N)])


def correlations(rewards: Floats) -> Floats:
    """(T,): Spearman's rank correlation, within a prompt, of the reward after each step with that after the last one;
    mean over prompts."""
    ranks = rewards.argsort(1).argsort(1).astype(np.float64)
    ranks -= ranks.mean(1, keepdims=True)
    last = ranks[..., -1:]
    within = (ranks * last).sum(1) / np.sqrt((ranks**2).sum(1) * (last**2).sum(1))
    return np.asarray(within.mean(0))
