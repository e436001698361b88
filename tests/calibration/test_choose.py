"""Which plan is taken, on banks whose best plan is known."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from flowfast.calibration import choose as chooses
from flowfast.calibration.choose import LADDER, Choice, choose, matching, rung, standard_error
from flowfast.errors import BudgetError
from flowfast.methods.prune import Prune
from tests.calibration.banks import path_of, route_of, walk, walked
from tests.toys import GaussianFlow


def three_states(P: int = 8, n: int = 200, seen_after: int = 2, T: int = 8) -> np.ndarray:
    """A chain is bad, fair or good (0, 1, 2): at random up to transition `seen_after`, from there on what it stays."""
    rng = np.random.default_rng(4)
    states = rng.choice(3, (P, n, T), p=(0.6, 0.3, 0.1)).astype(float)
    states[:, :, seen_after:] = states[:, :, -1:]
    return states + 1e-6 * rng.random((P, n, 1))  # no ties


def test_the_best_plan_cuts_all_but_one_where_the_state_is_seen() -> None:
    found = choose([route_of(three_states())], 64)
    n = found.best.counts[0]
    assert found.best.cuts == 1 and found.best.counts[2] == n > found.best.counts[3] == max(1, round(0.1 * n))
    assert n == max(choice.counts[0] for choice in found.choices if choice.counts[2] == choice.counts[0])
    expected = 2 * (1 - 0.9**n) + (0.9**n - 0.6**n)
    assert abs(found.best.mean - expected) < 0.1
    assert found.taken.counts == found.best.counts


@pytest.mark.parametrize("mutant", ["a transition before", "worst"])
def test_a_wrong_replay_would_show(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = chooses.replay

    def wrong(draws: np.ndarray, counts: Any) -> np.ndarray:
        if mutant == "worst":
            shown = np.concatenate([-draws[..., :-1], draws[..., -1:]], -1)
        else:
            shown = np.concatenate([draws[..., :1], draws[..., :-2], draws[..., -1:]], -1)
        return right(shown, counts)

    monkeypatch.setattr(chooses, "replay", wrong)
    found = choose([route_of(three_states())], 64)
    assert not (found.best.cuts == 1 and found.best.counts[2] > found.best.counts[3])


@pytest.mark.parametrize("budget", [10, 30, 80, 200])
def test_all_plans_keep_the_budget_and_fill_it(budget: int) -> None:
    route = route_of(walk(4, 24, [0.1, 0.4, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0]))
    for choice in choose([route], budget).choices:
        plan = choice.method.plan(route.resolved.schedule, budget, None, None)
        assert sum(map(sum, plan.quota)) == sum(choice.counts) == choice.nfe <= budget
        assert choice.nfe > budget - 8


def test_a_blind_reward_cuts_nothing_and_says_so() -> None:
    found = choose([route_of(walk(24, 24, [0.0, 0.05, 0.1, 0.1, 0.15, 1.0]))], 60)
    assert found.taken.method.name == "bon" and found.taken.counts == (10,) * 6
    assert [choice.method.name for choice in found.choices] == ["bon"]
    assert "blind" in found.why


def test_below_three_scouts_it_is_best_of_n() -> None:
    route = route_of(walk(24, 24, [0.0, 0.6, 0.8, 0.9, 0.95, 1.0]))
    assert choose([route], 6).taken.method.name == choose([route], 8).taken.method.name == "bon"
    with pytest.raises(BudgetError, match="one trajectory costs 6 NFE, but the budget is 5"):
        choose([route], 5)


@pytest.mark.parametrize("error", [0.0, 0.05, 10.0])
def test_within_one_standard_error_the_plainest_is_taken(error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chooses, "standard_error", lambda *_: error)
    found = choose([route_of(walk(6, 24, [0.1, 0.3, 0.5, 0.7, 0.8, 0.85, 0.9, 1.0]))], 100)
    near = [choice for choice in found.choices if found.best.mean - choice.mean <= error]
    default = [choice for choice in near if choice.method == Prune()]
    assert found.taken in (default or near) and found.best is found.choices[0]
    assert found.taken.cuts == min(choice.cuts for choice in (default or near))
    assert bool(default) == (error == 10.0) and (found.taken is found.best or "one standard error" in found.why)


def test_the_standard_error_is_that_of_differences_over_prompts() -> None:
    one, other = (Choice(0, Prune(), (1,), 1, np.array(values)) for values in ([1.0, 2.0, 6.0], [1.0, 1.0, 1.0]))
    assert standard_error(one, other) == pytest.approx(np.std([0, 1, 5], ddof=1) / 3**0.5)
    assert standard_error(one, one) == 0.0


def test_the_cheaper_path_is_taken_where_it_is_as_good() -> None:
    sees = [0.1, 0.3, 0.6, 0.8, 0.9, 0.95, 0.97, 1.0]
    long, short = walk(40, 24, sees), walk(40, 24, [0.4, 0.8, 0.9, 1.0])
    found = choose([route_of(long), route_of(short)], 40)
    assert found.taken.route == 1
    assert choose([route_of(long), route_of(short - 5)], 40).taken.route == 0


def test_the_same_choice_each_time() -> None:
    route = route_of(walk(6, 24, [0.2, 0.4, 0.7, 0.9, 1.0]))
    one, other = choose([route], 50), choose([route], 50)
    assert one.taken.method == other.taken.method and one.taken.mean == other.taken.mean and one.why == other.why


def test_budgets_stand_on_a_ladder() -> None:
    assert [rung(budget) for budget in (1, 39, 99, 199, 200, 223, 500)] == [1, 39, 99, 199, 200, 200, 500]
    assert sorted(set(LADDER)) == LADDER and max(LADDER) > 10_000_000
    steps = [b / a for a, b in zip(LADDER, LADDER[1:], strict=False) if a >= 200]
    assert min(steps) > 1.1 and max(steps) < 1.15


def test_a_search_that_goes_another_way_does_not_match() -> None:
    path = path_of(walk(2, 4, [0.5, 0.7, 1.0]))
    assert matching(path, walked(3))
    for other in ({"grid": "linear-times:1,.6,.1"}, {"diffusion": "square:1"}, {"interpolant": "vp"}):
        assert not matching(path, walked(3, **other)), other
    assert not matching(path, walked(4))
    other_flow = GaussianFlow()
    other_flow.guidance = 2.0
    assert not matching(path, walked(3, other_flow))
