"""A budget in seconds: what the host forecasts is what happens, cuts keep a search finished, a slow-down costs a round.

The clock is the flow's: every micro-batch takes a fixed time, more of it after a while.
"""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flowfast
from flowfast.engine import clock as clocks
from flowfast.engine.core import EngineCore
from flowfast.errors import BudgetError
from flowfast.rounds.batch import Limits
from tests.toys import METHODS, GaussianFlow, NearTarget, build

SEARCHING = [method for method in METHODS if method != "ode"]


@settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    method=st.sampled_from(SEARCHING),
    budget=st.integers(30, 150),
    lanes=st.sampled_from([None, 1, 3]),
    cuts=st.lists(st.tuples(st.integers(1, 12), st.floats(0, 1)), max_size=3, unique_by=lambda cut: cut[0]),
)
def test_rounds_after_cuts_are_as_forecast_and_end_finished(method, budget, lanes, cuts):
    bench = build(method, budget=budget, lanes=lanes, slots=1, micro_batch=1)
    plan, live, made = bench.plan, list[int](), list[tuple[int, int]]()
    bench.admit(0, "a")
    shares = dict(cuts)
    while bench.engine.width() > 0:
        if len(live) in shares:
            rest = sum(bench.engine.plans[0][len(live) :]) + sum(bench.engine.null_plans[0][len(live) :])
            made.append((len(live), int(shares.pop(len(live)) * rest)))
            forecast = plan.forecast(made)
            quota, left = torch.tensor(forecast.quota), torch.tensor(forecast.left)
            bench.engine.limit(0, Limits(quota, left, left > 0, *forecast[:3]))
            if bench.engine.width() == 0:
                break
        before = int(bench.engine.state.nfe[0])
        bench.round()
        live.append((int(bench.engine.state.nfe[0]) - before) // bench.engine.passes)
    forecast = plan.forecast(made)
    assert len(live) == len(forecast.widths)
    if any(plan.accept):
        assert all(seen <= most for seen, most in zip(live, forecast.widths, strict=True))
    else:
        assert live == forecast.widths
    for at, evaluations in made:
        alone = plan.forecast([cut for cut in made if cut[0] <= at])
        floor = sum(min(amount, len(plan.accept)) for amount in alone.left)  # what those that go on need to finish
        assert sum(live[at:]) <= max(evaluations, floor)
    assert bench.engine.release(0)["reward"][0] > -torch.inf


class SlowingFlow(GaussianFlow):
    """Moves the clock: `cost` seconds a call, `factor` times as much from `after` seconds on."""

    def __init__(self, clock: SimpleNamespace, cost: float, factor: float, after: float):
        super().__init__()
        self.clock, self.cost, self.factor, self.after = clock, cost, factor, after

    def velocity(self, x_t, t, cond):
        self.clock.now += self.cost * (self.factor if self.clock.now >= self.after else 1.0)
        return super().velocity(x_t, t, cond)


def timed(monkeypatch, method: str, factor: float, **options) -> tuple[flowfast.SearchResult, float]:
    """A search of 2 s for two prompts after a quick one that told the pace, and the longest round it may overshoot."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(clocks, "now", lambda: clock.now)
    flow = SlowingFlow(clock, 0.01, factor, 1e9)
    start = []

    def on_round(found):
        if not start:
            start.append(clock.now)
            flow.after = clock.now + 0.8
        rounds.append(clock.now)

    rounds: list[float] = []
    options = {"reward": NearTarget(), **options}
    result = flowfast.search(flow, ["a", "bb"], method=method, seconds=1.0, micro_batch=4, on_round=on_round, **options)
    longest = max((after - before for before, after in zip(rounds[:-1], rounds[1:], strict=True)), default=0.0)
    return result, longest


@pytest.mark.parametrize("factor", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("method", SEARCHING)
def test_a_slow_down_costs_a_round_at_most(monkeypatch, method, factor):
    result, longest = timed(monkeypatch, method, factor)
    assert result.overshoot == pytest.approx(result.seconds["total"] - 2.0)
    assert result.overshoot <= longest + 1e-9
    if factor == 1.0:
        assert result.overshoot <= 1e-9 and not result.config.cuts  # at the pace that was measured nothing is cut
        assert result.seconds["total"] > 1.0, "half of the time was left lying"
    assert all(sample.nfe <= sample.budget_nfe for sample in result.samples)


@pytest.mark.parametrize("factor", [0.5, 2.0])
def test_two_batches_with_a_host_reward_keep_the_deadline_too(monkeypatch, factor):
    """A round of either batch may be under way when time runs out."""

    def score(images, prompts):
        return -images.flatten(1).square().sum(1)

    result, longest = timed(monkeypatch, "rbf", factor, reward=score)
    assert result.config.overlap and result.config.slots == 2
    assert result.overshoot <= 2 * longest + 1e-9


@pytest.mark.parametrize("method", SEARCHING)
def test_without_the_guard_the_slow_down_would_be_late(monkeypatch, method):
    monkeypatch.setattr(EngineCore, "_keep_time", lambda self, batch: None)  # the mutant
    result, longest = timed(monkeypatch, method, 2.0)
    assert result.overshoot > longest


@pytest.mark.parametrize("method", SEARCHING)
def test_a_search_that_was_cut_reruns_the_same(monkeypatch, method):
    first, _ = timed(monkeypatch, method, 2.0)
    assert first.config.cuts
    monkeypatch.undo()
    config = first.config.model_copy(update={"seconds": None, "budget": first.samples[0].budget_nfe})
    again = flowfast.search(GaussianFlow(), ["a", "bb"], reward=NearTarget(), config=config)
    for one, other in zip(first.samples, again.samples, strict=True):
        assert (one.winner, one.nfe, one.reward) == (other.winner, other.nfe, other.reward)
        assert torch.equal(one.latent, other.latent)


def test_too_little_time_says_how_long_a_batch_takes(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(clocks, "now", lambda: clock.now)
    flow = SlowingFlow(clock, 0.01, 1.0, 1e9)
    with pytest.raises(BudgetError, match=r"0.05 s a prompt are too short here, where 4 rows take 0.01 s"):
        flowfast.search(flow, ["a"], reward=NearTarget(), method="rbf", seconds=0.05, micro_batch=4)
