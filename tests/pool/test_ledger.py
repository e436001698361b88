"""Who gets the next wave of a shared budget: figures by hand, and laws that hold for any rewards."""

from __future__ import annotations

import math
import random

import pytest

from flowfast.pool.ledger import MOST_SHARES, WIDTH, Ledger


def run(ledger: Ledger, rewards: dict[int, list[float | None]]) -> list[list[int]]:
    """Waves by their keys; rewards: what the waves of a key find, the last one again and again."""
    waves = []
    while chosen := ledger.next():
        waves.append([ledger.keys[at] for at in chosen])
        for at in chosen:
            found = rewards[ledger.keys[at]]
            ledger.heard(at, found[min(ledger.waves[at], len(found)) - 1])
    return waves


def test_waves_go_to_the_largest_gap_by_the_waves_that_it_has_had() -> None:
    """Three prompts of 30 NFE, waves of 10: nine in all, three of them first. Gaps 8, 3, 1 over waves + 1: 4, 1.5 and
    .5; the first one's falls to 8/3, 8/4, 8/5 = 1.6 and 8/6 = 1.33, below 1.5; then the second one's is 3/3."""
    rewards: dict[int, list[float | None]] = {1: [-8.0], 2: [-3.0], 3: [-1.0]}
    ledger = Ledger([1, 2, 3], share=30, wave=10, ceiling=0.0)
    assert run(ledger, rewards) == [[1, 2, 3], [1], [1], [1], [1], [2], [1]]
    assert ledger.waves == [6, 2, 1] and ledger.left == 0


@pytest.mark.parametrize(("count", "width"), [(4, 1), (8, 2), (20, 5), (32, 8), (100, 8)])
def test_a_quarter_of_the_prompts_stands_in_a_wave_and_eight_at_most(count: int, width: int) -> None:
    keys = list(range(count))
    rewards: dict[int, list[float | None]] = {key: [-float(key + 1)] for key in keys}
    waves = run(Ledger(keys, share=19, wave=10, ceiling=0.0), rewards)
    assert waves[:2] == [keys, keys[::-1][:width]] and WIDTH == 8


def test_equal_gaps_go_by_the_key() -> None:
    keys = [5, 3, 9, 1]
    rewards: dict[int, list[float | None]] = {key: [-1.0] for key in keys}
    waves = run(Ledger(keys, share=15, wave=10, ceiling=0.0), rewards)
    assert waves == [[1, 3, 5, 9], [1], [3]]


@pytest.mark.parametrize("seed", range(20))
def test_laws(seed: int) -> None:
    """The total is never exceeded, no prompt gets more than its cap, and any order of prompts gives the same waves."""
    rng = random.Random(seed)
    keys = rng.sample(range(-(2**60), 2**60), rng.randint(1, 40))
    share, wave = rng.randint(20, 200), rng.randint(5, 20)
    rewards: dict[int, list[float | None]] = {
        key: [rng.choice([None, 0.0, -rng.expovariate(1.0)]) for _ in range(30)] for key in keys
    }
    ledger = Ledger(keys, share, wave, ceiling=0.0)
    waves = run(ledger, rewards)
    assert waves[0] == sorted(keys)[: share * len(keys) // wave]
    assert all(len(each) <= max(1, min(WIDTH, len(keys) // 4)) for each in waves[1:])
    assert sum(ledger.waves) * wave + ledger.left == share * len(keys) and ledger.left >= 0
    assert all(count * wave <= MOST_SHARES * share for count in ledger.waves)
    more = [at for at in range(len(keys)) if ledger.may_have_more(at)]
    assert ledger.left < wave or not more  # nothing that could be paid was left
    assert all(ledger.waves[at] < 31 and (not ledger.lost[at] or ledger.waves[at] <= 30) for at in range(len(keys)))
    shuffled = rng.sample(keys, len(keys))
    assert run(Ledger(shuffled, share, wave, ceiling=0.0), rewards) == waves


def test_who_found_nothing_or_has_the_ceiling_gets_no_more() -> None:
    rewards: dict[int, list[float | None]] = {1: [None], 2: [0.0], 3: [-1.0], 4: [-5.0, -0.5]}
    ledger = Ledger([1, 2, 3, 4], share=30, wave=10, ceiling=0.0, until=-0.5)
    waves = run(ledger, rewards)
    assert [ledger.waves[at] for at in (0, 1, 3)] == [1, 1, 2]
    assert sum(map(len, waves)) == 12 and ledger.waves[2] == 8 and ledger.left == 0


def test_one_that_eats_for_ever_stops_at_its_cap() -> None:
    rewards: dict[int, list[float | None]] = {1: [-math.inf], 2: [0.0], 3: [0.0]}
    ledger = Ledger([1, 2, 3], share=10, wave=5, ceiling=0.0, shares=100)
    run(ledger, rewards)
    assert ledger.waves == [MOST_SHARES * 10 // 5, 1, 1] and ledger.left == 1000 - 70


def test_a_last_wave_that_cannot_be_paid_in_full_is_paid_in_its_order() -> None:
    keys = list(range(32))
    rewards: dict[int, list[float | None]] = {key: [-float(key + 1)] for key in keys}
    waves = run(Ledger(keys, share=12, wave=10, ceiling=0.0), rewards)  # 384 NFE: 32 waves, and six more
    assert waves == [keys, [31, 30, 29, 28, 27, 26]]
