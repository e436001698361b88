"""Prune against an oracle: every scout is run to its end with all of its rewards, and the cuts are made afterwards."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import OptionError
from flowfast.methods import make_method, prune
from flowfast.methods.prune import BestLiveOn
from tests.toys import GaussianFlow, NearTarget, build

PROMPTS = ["a", "bb", "ccc"]
OPTIONS: dict[str, Any] = {"steps": 8, "micro_batch": 4, "seed": 3}


class Late(NearTarget):
    """Cannot tell much before the end: ranks change on the way."""

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        wave = torch.cos(40.0 * images.flatten(1).sum(1))
        return super().forward(images, t, cond) + 3.0 * t * wave


def plan_of(budget: int, **options: Any) -> Any:
    return build("prune", budget=budget, steps=8, method_options=options).plan


def counts_of(plan: Any) -> list[int]:
    """Chains at each transition."""
    return [sum(q[at] for q in plan.quota) for at in range(len(plan.accept))]


def all_rewards(n: int, flow: Any, reward: Any) -> list[list[list[float]]]:
    """Of each prompt, chain and transition, by best-of-n on the same noise."""
    T = len(plan_of(60).accept)
    found = [[[-math.inf] * T for _ in range(n)] for _ in PROMPTS]

    def note(candidates: list[flowfast.Candidate]) -> None:
        for each in candidates:
            assert each.reward is not None
            found[each.prompt][each.chain][each.transition] = each.reward

    flowfast.search(
        flow, PROMPTS, reward=reward, method="bon", chains=n, budget=n * T, score_all=True, on_round=note, **OPTIONS
    )
    return found


def expected(rewards: list[list[float]], counts: list[int]) -> int:
    """The chain that wins: after each cut the best go on, ties to the lower."""
    alive = list(range(len(rewards)))
    for at, count in enumerate(counts[1:]):
        if count < len(alive):
            alive = sorted(sorted(alive, key=lambda c: (-rewards[c][at], c))[:count])
    return min(alive, key=lambda c: (-rewards[c][-1], c))


def winners(budget: int, reward: Any, **options: Any) -> tuple[list[int], flowfast.SearchResult]:
    """The scout of each prompt that won."""
    found = flowfast.search(
        GaussianFlow(), PROMPTS, reward=reward, method="prune", method_options=options, budget=budget, **OPTIONS
    )
    return [sample.winner.path[0][0] for sample in found.samples], found


@pytest.mark.parametrize("budget", [20, 60, 150, 400])
@pytest.mark.parametrize("options", [{}, {"at": (0.8, 0.5, 0.3), "keep": (0.7, 0.5, 0.1)}], ids=["two cuts", "three"])
def test_the_best_go_on_as_if_all_had_been_run(budget: int, options: dict[str, Any]) -> None:
    plan = plan_of(budget, **options)
    rewards, counts = all_rewards(plan.chains, GaussianFlow(), Late()), counts_of(plan)
    chains, found = winners(budget, Late(), **options)
    assert chains == [expected(of_prompt, counts) for of_prompt in rewards]
    for sample, of_prompt, chain in zip(found.samples, rewards, chains, strict=True):
        assert sample.reward == of_prompt[chain][-1]
        assert sample.nfe == sum(counts) <= budget
        assert sample.reward_calls == sum(counts[at] for at, cuts in enumerate(plan.regroup) if cuts) + counts[-1]


@pytest.mark.parametrize("mutant", ["the worst", "the first"])
def test_who_goes_on_shows(mutant: str, monkeypatch: pytest.MonkeyPatch) -> None:
    regroup = BestLiveOn.regroup

    def other(self: Any, rewards: Tensor, *rest: Tensor) -> Tensor:
        live = rewards > -torch.inf
        sign = -rewards if mutant == "the worst" else torch.zeros_like(rewards)
        return regroup(self, torch.where(live, sign, rewards), *rest)

    plan = plan_of(150)
    rewards, counts = all_rewards(plan.chains, GaussianFlow(), Late()), counts_of(plan)
    monkeypatch.setattr(BestLiveOn, "regroup", other)
    assert winners(150, Late())[0] != [expected(of_prompt, counts) for of_prompt in rewards]


class Breaks(GaussianFlow):
    """The velocity of many scouts is NaN from the middle on."""

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        u = super().velocity(x_t, t, cond)
        bad = (t < 0.8) & (x_t[:, 0] > 0)
        return torch.where(bad[:, None], torch.nan, u)


def test_broken_scouts_rank_last_and_their_places_are_taken() -> None:
    found = flowfast.search(Breaks(), PROMPTS, reward=NearTarget(), method="prune", budget=200, **OPTIONS)
    assert all(sample.latent.isfinite().all() for sample in found.samples)
    assert all(sample.nfe <= 200 for sample in found.samples)


def test_where_all_break_the_request_fails() -> None:
    class Dead(GaussianFlow):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            u = super().velocity(x_t, t, cond)
            return torch.where((t < 0.4)[:, None], torch.nan, u)

    with pytest.raises(flowfast.errors.ModelError, match="no finished sample"):
        flowfast.search(Dead(), PROMPTS, reward=NearTarget(), method="prune", budget=100, **OPTIONS)


@pytest.mark.parametrize(
    ("options", "budget", "counts"),
    [
        ({}, 9, [1] * 9),
        ({}, 16, [1] * 9),
        ({}, 18, [3, 3, 3, 3, 1, 1, 1, 1, 1]),
        ({"n": 2}, 18, [2] * 9),  # too few to cut
        ({"n": 10}, 100, [10, 10, 10, 10, 4, 2, 2, 2, 2]),
        ({"n": 10, "at": (0.7, 0.69)}, 100, [10, 10, 10, 10, 2, 2, 2, 2, 2]),  # both after one transition: the last one
        ({"n": 4, "keep": (0.01, 0.01)}, 100, [4, 4, 4, 4, 1, 1, 1, 1, 1]),
        ({"n": 10, "at": (0.05,), "keep": (0.5,)}, 100, [10] * 9),  # a cut after the end is none
    ],
)
def test_scouts_at_each_transition(options: dict[str, Any], budget: int, counts: list[int]) -> None:
    assert counts_of(plan_of(budget, **options)) == counts


def test_as_many_scouts_as_the_budget_pays() -> None:
    for budget in range(9, 300, 7):
        n = plan_of(budget).chains
        assert sum(counts_of(plan_of(budget))) <= budget
        with pytest.raises(flowfast.errors.BudgetError, match="prune's n"):
            plan_of(budget, n=n + 1)


@pytest.mark.parametrize("options", [{"at": (0.5, 0.7)}, {"keep": (0.2, 0.5)}, {"at": (0.7,)}, {"at": (), "keep": ()}])
def test_cuts_that_do_not_fall_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="as many falling shares"):
        build("prune", budget=60, method_options=options)


@pytest.mark.parametrize("options", [{"at": (1.5, 0.5)}, {"keep": (0.0, 0.0)}, {"n": 0}])
def test_numbers_are_bounded(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError):
        make_method("prune", options)


BUDGETS = [20, 60, 100, 150]


def together() -> list[flowfast.Sample]:
    """Searches of different budgets in one batch."""
    with flowfast.Engine(GaussianFlow(), Late(), micro_batch=4, slots=4, max_budget=150) as engine:
        for budget in BUDGETS:
            engine.add_request("bb", id=str(budget), method="prune", budget=budget, steps=8, seed=3)
        found = {event.id: event.sample for event in engine.stream() if isinstance(event, flowfast.Finished)}
        assert len(engine.core.scheduler.batches) == 1
    return [found[str(budget)] for budget in BUDGETS]


def alone() -> list[flowfast.Sample]:
    options: dict[str, Any] = {"reward": Late(), "method": "prune", **OPTIONS}
    return [flowfast.search(GaussianFlow(), ["bb"], budget=budget, **options).samples[0] for budget in BUDGETS]


def facts(samples: list[flowfast.Sample]) -> list[Any]:
    return [(sample.latent.tolist(), sample.winner, sample.nfe, sample.reward_calls) for sample in samples]


def test_smaller_budgets_share_a_batch_with_their_own_bits() -> None:
    assert facts(together()) == facts(alone())


def test_a_smaller_plan_that_kept_as_many_as_another_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: how many go on is the batch's, not the request's."""
    expected = facts(alone())
    monkeypatch.setattr(prune.BestLiveOn, "reset", lambda self, slot, quota: self.keep[slot].fill_(2))
    assert facts(together()) != expected
