"""What requests have in common."""

from __future__ import annotations

import pytest

import flowfast
from flowfast.engine import prepare
from tests.toys import GaussianFlow, NearTarget


def test_what_is_remembered_of_requests_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_KEPT", 4)
    engine = flowfast.Engine(GaussianFlow(), reward=NearTarget(), slots=2, micro_batch=4)
    for at in range(12):
        engine.add_request("a", method="bon", budget=20 + at, steps=4, guidance=1.5 + at, negative_prompt="b" * at)
    assert sum(isinstance(event, flowfast.Finished) for event in engine.stream()) == 12
    of = engine.preparer
    assert [len(each.kept) for each in (of._resolved, of._plans, of._rooms, of._null)] == [4, 4, 4, 4]


def test_the_last_ones_asked_for_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MOST_KEPT", 2)
    kept: prepare.Recent[str, int] = prepare.Recent()
    made: list[str] = []

    def of(key: str) -> int:
        return kept.get(key, lambda: made.append(key) or len(made))

    assert [of(key) for key in ("a", "b", "a", "c", "a", "b")] == [1, 2, 1, 3, 1, 4]
    assert made == ["a", "b", "c", "b"]


@pytest.mark.parametrize(
    ("method", "budget", "rows"),
    [
        ("ode", 40, 1),
        ("ode", 500, 1),
        ("rbf", 40, 2),
        ("rbf", 500, 2),
        ("svdd", 500, 8),
        ("bon", 20, 4),
        ("bon", 500, 8),
    ],
)
def test_a_lone_request_pays_for_no_padding_where_no_micro_batch_is_given(method: str, budget: int, rows: int) -> None:
    """By the request alone, whoever is there."""
    for others in (0, 3):
        engine = flowfast.Engine(GaussianFlow(), reward=NearTarget(), slots=4)
        for at in range(others):
            engine.add_request("b", method=method, budget=60 + at, steps=4)
        engine.add_request("a", id="a", method=method, budget=budget, steps=4)
        engine.step()
        (found,) = [batch for batch, _, job in engine.core.scheduler.running() if job.request.id == "a"]
        assert found.runner.micro_batch == rows
    given = flowfast.Engine(GaussianFlow(), reward=NearTarget(), slots=4, micro_batch=16)
    given.add_request("a", method=method, budget=budget, steps=4)
    given.step()
    assert {batch.runner.micro_batch for batch in given.core.scheduler.batches} == {16}


def test_small_budgets_share_a_batch_with_large_ones_and_keep_their_bits() -> None:
    """In few evaluations no children compete at some transitions, whose scores are then read by nobody."""
    budgets = [8, 11, 20, 60]
    options = {"method": "svdd", "steps": 6, "chains": 1}
    with flowfast.Engine(GaussianFlow(), reward=NearTarget(), slots=4, micro_batch=4, max_budget=60) as engine:
        for budget in budgets:
            engine.add_request("a", id=str(budget), budget=budget, **options)
        found = {event.id: event.sample for event in engine.stream() if isinstance(event, flowfast.Finished)}
        assert len(engine.core.scheduler.batches) == 1
    for budget in budgets:
        result = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), budget=budget, micro_batch=4, **options)
        alone, together = result.samples[0], found[str(budget)]
        assert (alone.winner, alone.nfe, alone.reward) == (together.winner, together.nfe, together.reward)
        assert alone.latent.equal(together.latent) and alone.reward_calls <= together.reward_calls
    assert found["8"].reward_calls > 1  # alone its end is all that is scored
