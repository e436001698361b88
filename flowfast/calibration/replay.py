"""A plan replayed on a bank: what its search would have found, had it drawn its chains from there. numpy only.

A search whose chains only go on or end is known from the rewards of whole trajectories: `counts` says how many are
alive at each transition, and where the number falls the best rewards go on. Chains are drawn without replacement from
those that the bank has of a prompt: then the mean over draws is unbiased (a U-statistic).

For more chains than that a draw with replacement would fall short, for none is better than the bank's best: on public
rewards of FLUX.1-dev (24 of 200 images a prompt) by .1 to .4 standard deviations at 40 to 80 chains. There the
trajectories of all prompts are pooled, each as standard scores among those of its own prompt. A final score becomes a
reward by its rank in the pool and the prompt's own quantiles, lines between normal scores that go on beyond the best:
within .12 on those rewards, .1 too low for normal ones. That takes for granted that prompts differ in their rewards,
but not in how these move along t.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

DRAWS, MOST_DRAWN = 16, 768
"""Of each prompt: draws, and chains in all of them, for the more chains there are the less the best of them varies."""


def drawn(rewards: np.ndarray, chains: int, seed: int = 0, draws: int | None = None) -> np.ndarray:
    """Trajectories (P, draws, chains, T) for plans of so many chains or fewer, which take the first ones. The same for
    the same seed."""
    draws = draws or max(1, min(DRAWS, MOST_DRAWN // chains))
    rng = np.random.default_rng(seed)
    P, n, T = rewards.shape
    if chains <= n:
        chosen = rng.random((P, draws, n)).argsort(-1)[..., :chains]
        return np.take_along_axis(rewards[:, None], chosen[..., None], 2)
    spread = rewards.std(1, keepdims=True)
    scores = ((rewards - rewards.mean(1, keepdims=True)) / np.where(spread > 0, spread, 1)).reshape(P * n, T)
    ranks = (scores[:, -1].argsort(kind="stable").argsort(kind="stable") + 0.5) / (P * n)
    orders = [rng.random((P, draws, P * n)).argsort(-1) for _ in range(-(-chains // (P * n)))]
    chosen = np.concatenate(orders, -1)[..., :chains]
    found, ranks = scores[chosen], ranks[chosen]
    for prompt, final in enumerate(np.sort(rewards[..., -1], 1)):
        found[prompt, ..., -1] = quantiles(final, ranks[prompt])
    return found


def quantiles(final: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """Rewards at ranks in 0..1 of a prompt with these final rewards (n,), sorted."""
    from scipy.special import ndtri

    n = len(final)
    scores = ndtri((np.arange(1, n + 1) - 0.375) / (n + 0.25))  # Blom's, of normal order statistics
    wanted = ndtri(ranks)
    top = max(3, n // 4)
    slope = np.polyfit(scores[-top:], final[-top:], 1)[0] if n >= top else 0.0
    return np.interp(wanted, scores, final) + slope * np.maximum(0.0, wanted - scores[-1])


def replay(trajectories: np.ndarray, counts: Sequence[int]) -> np.ndarray:
    """(P,): the mean final reward that a plan finds for each prompt. trajectories: of `drawn`; counts (T,): chains that
    are alive at each transition, falling."""
    live, alive = trajectories[..., : counts[0], :], counts[0]
    for at in range(1, len(counts)):
        if counts[at] < alive:
            alive = counts[at]
            best = np.argpartition(-live[..., at - 1], alive - 1, -1)[..., :alive]
            live = np.take_along_axis(live, best[..., None], 2)
    return live[..., -1].max(-1).mean(1)
