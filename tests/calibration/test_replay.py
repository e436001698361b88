"""Plans replayed on banks whose law is known."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest

from flowfast.calibration import replay as replays
from flowfast.calibration.replay import drawn, quantiles, replay
from tests.calibration.banks import walk


def with_replacement(rewards: np.ndarray, chains: int, seed: int = 0, draws: int = 16) -> np.ndarray:
    """The mutant: a chain may be drawn twice."""
    P, n, _ = rewards.shape
    chosen = np.random.default_rng(seed).integers(0, n, (P, draws, chains))
    return np.take_along_axis(rewards[:, None], chosen[..., None], 2)


def mean_best(values: np.ndarray, n: int) -> float:
    """Of the best of n without replacement, exactly."""
    N = len(values)
    return sum(comb(i, n - 1) * value for i, value in enumerate(sorted(values))) / comb(N, n)


@pytest.mark.parametrize("n", [1, 3, 12, 23, 24])
def test_the_best_of_n_is_that_of_order_statistics(n: int) -> None:
    rewards = walk(3, 24, [0.3, 1.0])
    exact = np.array([mean_best(of_prompt[:, -1], n) for of_prompt in rewards])
    draws = drawn(rewards, n, draws=4000)
    error = draws[..., -1].max(-1).std(1) / 4000**0.5 + 1e-12
    assert (np.abs(replay(draws, [n, n]) - exact) < 4.9 * error).all()
    if n >= 12:
        mutant = replay(with_replacement(rewards, n, draws=4000), [n, n])
        assert (np.abs(mutant - exact) > 4.9 * error).all()


def truth(sees: list[float], counts: list[int]) -> float:
    return float(replay(walk(1, 40_000 * counts[0], sees, seed=9).reshape(1, 40_000, counts[0], -1), counts)[0])


@pytest.mark.parametrize("counts", [[60, 60, 60, 60], [60, 20, 20, 6], [40, 40, 10, 10]])
def test_more_chains_than_the_bank_has(counts: list[int]) -> None:
    """Over 12 banks of 24 prompts and 24 chains: within .15 standard deviations; with replacement .25 too low."""
    sees = [0.4, 0.7, 0.9, 1.0]
    found, mutant = ([], [])  # type: tuple[list[float], list[float]]
    for seed in range(12):
        bank = walk(24, 24, sees, seed)
        found.append(replay(drawn(bank, counts[0], seed), counts).mean())
        mutant.append(replay(with_replacement(bank, counts[0], seed), counts).mean())
    exact = truth(sees, counts)
    assert abs(np.mean(found) - exact) < 0.15, (np.mean(found), exact)
    assert np.mean(mutant) < exact - 0.25, (np.mean(mutant), exact)


def test_the_two_kinds_of_draws_agree_where_both_can_be() -> None:
    counts, bank = [24, 8, 8, 3], walk(24, 24, [0.4, 0.7, 0.9, 1.0])
    exact = replay(drawn(bank, 24, draws=64), counts).mean()
    extended = replay(drawn(bank, 25, draws=64), counts).mean()
    assert abs(exact - extended) < 0.15


def test_quantiles_go_through_the_rewards_and_beyond_them() -> None:
    final = np.sort(np.random.default_rng(1).standard_normal(24))
    inside = quantiles(final, (np.arange(1, 25) - 0.375) / 24.25)
    assert np.allclose(inside, final)
    assert quantiles(final, np.array([0.999]))[0] > final[-1]
    assert quantiles(np.zeros(24), np.array([0.1, 0.999])).tolist() == [0.0, 0.0]


def test_who_goes_on_is_seen_after_the_transition_before() -> None:
    """Chain 0 is best after transition 0 alone, chain 1 at the end alone."""
    rewards = np.array([[[9.0, 0.0, 0.0], [0.0, 9.0, 5.0], [1.0, 1.0, 1.0]]])[:, None]
    assert replay(rewards, [3, 1, 1]).tolist() == [0.0]
    assert replay(rewards, [3, 3, 1]).tolist() == [5.0]
    assert replay(rewards, [3, 2, 1]).tolist() == [1.0]
    assert replay(rewards, [1, 1, 1]).tolist() == [0.0]


@pytest.mark.parametrize("chains", [5, 24, 60, 700])
def test_draws_are_the_same_each_time_and_none_comes_twice(chains: int) -> None:
    bank = walk(2, 24, [0.5, 1.0])
    assert np.array_equal(drawn(bank, chains), drawn(bank, chains))
    assert not np.array_equal(drawn(bank, chains), drawn(bank, chains, seed=1))
    first = drawn(bank, chains)[0, 0, :, 0]
    assert first.shape == (chains,) and len(set(first)) == min(chains, 2 * 24 if chains > 24 else 24, chains)


def test_smaller_plans_take_the_first_chains_of_the_same_draws() -> None:
    bank = walk(2, 24, [0.5, 1.0])
    assert np.array_equal(drawn(bank, 20)[:, :, :7], drawn(bank, 7))


def test_numpy_is_all_that_it_needs() -> None:
    assert not [name for name in vars(replays) if name in ("torch", "flowfast")]
