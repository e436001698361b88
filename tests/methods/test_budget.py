"""Budgets (testing.md E1, E2): never over, exact accounts, and a clear word where a budget cannot work."""

import re

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowfast
from flowfast.errors import BudgetError, FlowfastError, OptionError
from tests.toys import METHODS, GaussianFlow, NearTarget

EXACT = ("svdd", "rbf", "rbf-official")
"""Methods that can spend any budget to the last evaluation; the others work with whole trajectories."""


def search(method: str, prompts: list[str], flow: GaussianFlow, **options) -> flowfast.SearchResult:
    return flowfast.search(flow, prompts, reward=NearTarget(), method=method, **options)


@settings(max_examples=120, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(METHODS),
    budget=st.integers(1, 150),
    guidance=st.sampled_from([1.0, 3.0, "3@0.3:0.75"]),
    steps=st.integers(2, 12),
    lanes=st.sampled_from([None, 1, 2, 5, 8]),
    chains=st.sampled_from([None, 1, 2, 3, 7]),
    micro_batch=st.sampled_from([1, 4, 16]),
    slots=st.sampled_from([1, 2, 3]),
    interpolant=st.sampled_from(["linear", "vp"]),
    until=st.sampled_from([None, -5.0]),
)
def test_spent_is_within_budget_and_every_row_is_accounted_for(
    method, budget, guidance, steps, lanes, chains, micro_batch, slots, interpolant, until
):
    flow, seen = GaussianFlow(), list[flowfast.Candidate]()
    passes = {1.0: 1, 3.0: 2}.get(guidance)
    try:
        result = search(
            method,
            ["a", "bb", "ccc"],
            flow,
            budget=budget,
            guidance=guidance,
            steps=steps,
            lanes=lanes,
            chains=chains,
            micro_batch=micro_batch,
            slots=slots,
            interpolant=interpolant,
            until=until,
            score_all=True,
            on_round=seen.extend,
        )
    except FlowfastError as error:
        assert int(flow.seen) == 0  # refused before the first model call
        assert isinstance(error, BudgetError) or "guidance acts nowhere" in str(error)
        return
    spent = 0
    for at, sample in enumerate(result.samples):
        assert 0 < sample.nfe <= budget == sample.nfe + sample.unspent
        own = [each for each in seen if each.prompt == at]
        assert sample.evaluations == len(own)
        assert sample.nfe == sum(passes or (2 if 0.3 <= each.t <= 0.75 else 1) for each in own)
        assert 0 < sample.reward_calls <= sample.evaluations
        assert 0 <= sample.nfe_speculative < sample.nfe
        if until is None and sample.nfe_speculative == 0 and method in EXACT:
            assert sample.unspent == budget % passes if passes else sample.unspent < 4 * 7
        spent += sample.nfe
    assert spent + result.rows_padded == int(flow.seen)


@pytest.mark.parametrize("steps", [2, 6, 10])
@pytest.mark.parametrize("guidance", [1.0, 3.0, "3@0.5:1"])
@pytest.mark.parametrize("method", METHODS)
def test_a_budget_below_the_need_names_the_minimum_and_the_minimum_works(method, guidance, steps):
    flow = GaussianFlow()
    with pytest.raises(BudgetError) as refused:
        search(method, ["a"], flow, budget=1, guidance=guidance, steps=steps)
    least = int(re.search(r"at least (\d+) NFE", str(refused.value))[1])
    with pytest.raises(BudgetError):
        search(method, ["a"], flow, budget=least - 1, guidance=guidance, steps=steps)
    assert int(flow.seen) == 0
    sample = search(method, ["a"], flow, budget=least, guidance=guidance, steps=steps).samples[0]
    assert sample.nfe <= least


@pytest.mark.parametrize("interpolant", ["linear", "vp"])
@pytest.mark.parametrize("method", METHODS)
def test_every_method_runs_at_50_nfe_with_guidance_and_10_steps(method, interpolant):
    sample = search(method, ["a"], GaussianFlow(), budget=50, guidance=3.0, steps=10, interpolant=interpolant).samples[
        0
    ]
    assert sample.nfe <= 50
    assert sample.nfe > 25 or method == "ode"
    if method in EXACT:
        assert sample.nfe == 50


@pytest.mark.parametrize("budget", [0, -3])
@pytest.mark.parametrize("method", METHODS)
def test_nothing_to_spend_is_refused(method, budget):
    with pytest.raises(BudgetError):
        search(method, ["a"], GaussianFlow(), budget=budget)


def test_no_budget_or_two_budgets_are_refused():
    for options in ({}, {"budget": 50, "seconds": 1.0}):
        with pytest.raises(OptionError, match="budget"):
            search("rbf", ["a"], GaussianFlow(), **options)


def test_too_many_chains_for_the_budget_are_refused():
    with pytest.raises(BudgetError, match="chains"):
        search("rbf", ["a"], GaussianFlow(), budget=50, chains=20)


@pytest.mark.parametrize("method", ["bon", "svdd", "rbf"])
def test_seconds_become_rounds(method):
    result = search(method, ["a", "bb"], GaussianFlow(), seconds=0.05)
    for sample in result.samples:
        assert 0 < sample.nfe <= sample.budget_nfe
    assert sum(result.seconds[part] for part in ("model", "decode", "reward", "search")) <= result.seconds["total"] < 5
    with pytest.raises(BudgetError):
        search(method, ["a"], GaussianFlow(), seconds=0.0)
