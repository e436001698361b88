"""The public engine: what it refuses, how requests end, and what may change under it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfast
from flowfast.engine import clock
from flowfast.engine.admission import rounded_up
from flowfast.errors import BudgetError, OptionError, PromptError
from tests.toys import GaussianFlow, NearTarget

SVDD: dict[str, Any] = {"method": "svdd", "budget": 24, "steps": 6}


class Weighted(GaussianFlow):
    """With a parameter, as models have, and a part in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(()))
        self.drop = nn.Dropout(0.5)

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.drop(super().velocity(x_t, t, cond) * self.gain)


def near(images: Tensor, prompts: list[str]) -> Tensor:
    return -(images.flatten(1) - 1).square().sum(1)


def engine(flow: Any = None, **options: Any) -> flowfast.Engine:
    rewards = {"near": NearTarget(), "host": near}
    return flowfast.Engine(
        flow or GaussianFlow(), rewards, **{"slots": 2, "micro_batch": 4, "max_budget": 60, **options}
    )


def last_of(events: list[Any]) -> dict[str, Any]:
    return {event.id: event for event in events if isinstance(event, flowfast.Finished | flowfast.Failed)}


def test_a_request_is_told_of_its_rounds_of_better_samples_and_of_its_end() -> None:
    one = engine()
    id = one.add_request("a", **SVDD)
    assert id == "0" and one.busy
    events = list(one.stream())
    assert {event.id for event in events} == {id} and not one.busy
    spent = [event.nfe for event in events if isinstance(event, flowfast.Progress)]
    assert spent == sorted(spent) and spent[-1] == 24 and events[0].budget == 24
    found = [event.reward for event in events if isinstance(event, flowfast.Found)]
    assert found == sorted(set(found)) and found[-1] == events[-1].sample.reward
    plain = flowfast.search(GaussianFlow(), ["a"], reward=NearTarget(), micro_batch=4, slots=2, **SVDD)
    assert torch.equal(events[-1].sample.latent, plain.samples[0].latent)
    assert (events[-1].rerun.cuts, events[-1].rerun.splits) == ((), ()) and events[-1].seconds > 0


@pytest.mark.parametrize(
    ("params", "kind", "match"),
    [
        ({"reward": "far"}, OptionError, "unknown reward 'far': this engine has near, host"),
        ({"id": "there"}, OptionError, "an id that no other request has"),
        ({"id": 7}, OptionError, "an id that no other request has, got 7"),
        ({"budget": None}, OptionError, "expected a budget in NFE"),
        ({"seconds": 3.0}, OptionError, "give a budget in NFE and a deadline"),
        ({"budget": 61}, BudgetError, "up to 60 NFE, got 61"),
        ({"budget": 3}, BudgetError, "needs at least"),
        ({"priority": 0.5}, OptionError, "priority to be a whole number, got 0.5"),
        ({"priority": True}, OptionError, "priority"),
        ({"priority": 1 << 40}, OptionError, "priority"),
        ({"deadline": 0}, OptionError, "deadline to be positive seconds"),
        ({"deadline": float("nan")}, OptionError, "deadline"),
        ({"deadline": "soon"}, OptionError, "deadline"),
        ({"prompt": 3}, PromptError, "got"),
        ({"speed": 2}, OptionError, "unknown option 'speed': choose of"),
        ({"slots": 2}, OptionError, "unknown option 'slots'"),
        ({"latents": torch.zeros(5)}, OptionError, "latents"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_before_it_is_taken_on(params: Any, kind: Any, match: str) -> None:
    one = engine()
    one.add_request("a", id="there", **SVDD)
    with pytest.raises(kind, match=match):
        one.add_request(**{"prompt": "a", **SVDD, **params})
    assert set(last_of(list(one.stream()))) == {"there"}


def test_an_id_may_be_used_again_once_its_end_was_told() -> None:
    one = engine()
    for _ in range(2):
        assert one.add_request("a", id="mine", **SVDD) == "mine"
        assert isinstance(last_of(list(one.stream()))["mine"], flowfast.Finished)


def test_a_full_queue_and_a_deadline_that_cannot_be_met_are_events(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(clock, "now", lambda: seconds[0])
    one = engine(slots=1, max_waiting=1)
    one.add_request("a", id="runs", **SVDD)
    told = one.step()
    seconds[0] += 1.0
    told += one.step()
    one.add_request("a", id="too soon", deadline=0.5, **SVDD)
    one.add_request("a", id="waits", deadline=1e4, **SVDD)
    one.add_request("a", id="too many", **SVDD)
    told += one.stream()
    found = {id: getattr(event, "reason", "finished") for id, event in last_of(told).items()}
    assert found == {"runs": "finished", "too soon": "deadline", "waits": "finished", "too many": "full"}
    assert isinstance(last_of(told)["too many"].error, flowfast.errors.QueueFullError)


def refused_with(monkeypatch: pytest.MonkeyPatch, deadline: float, rounds: int = 2) -> Any:
    """The error of a request with this deadline behind one that has run so many of its seven rounds of a second each;
    None: it came in."""
    seconds = [100.0]
    monkeypatch.setattr(clock, "now", lambda: seconds[0])
    one = engine(slots=1)
    one.add_request("a", id="runs", **SVDD)
    for _ in range(rounds):
        seconds[0] += 1.0
        one.step()
    one.add_request("a", id="late", deadline=deadline, **SVDD)
    told = last_of(one.step()).get("late")
    return None if told is None else told.error


def test_a_deadline_that_cannot_be_met_is_refused_with_the_time_it_would_take(monkeypatch: pytest.MonkeyPatch) -> None:
    error = refused_with(monkeypatch, 0.5)
    assert isinstance(error, flowfast.errors.DeadlineError) and error.seconds is not None
    assert f"within its 0.5 s beside those that were taken on before: it takes {error.seconds:g} s at" in str(error)
    assert error.seconds == 12  # five rounds of the other, seven of its own
    assert refused_with(monkeypatch, error.seconds) is None
    assert refused_with(monkeypatch, error.seconds - 0.1) is not None


def test_one_that_would_make_another_late_is_refused_with_that(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = [0.0]
    monkeypatch.setattr(clock, "now", lambda: seconds[0])
    one = engine(slots=1)
    one.add_request("a", id="runs", **SVDD)
    seconds[0] += 1.0
    one.step()
    one.add_request("a", id="taken", deadline=14, **SVDD)
    one.add_request("a", id="pushes", deadline=50, priority=-5, **SVDD)
    error = last_of(one.step())["pushes"].error
    assert isinstance(error, flowfast.errors.DeadlineError) and error.seconds is not None and error.seconds < 50
    assert f"would take {error.seconds:g} s of its 50 s, but one that was taken on before would miss" in str(error)


@pytest.mark.parametrize(
    ("seconds", "expected"), [(3.1409, 3.15), (3.14, 3.14), (1234.5, 1240), (0.0123456, 0.0124), (0, 0), (99.99, 100)]
)
def test_the_time_that_is_named_is_enough(seconds: float, expected: float) -> None:
    assert rounded_up(seconds) == pytest.approx(expected, rel=1e-12)


def test_no_request_may_wait_and_those_with_a_slot_run_all_the_same() -> None:
    one = engine(max_waiting=0)
    for id in "abc":
        one.add_request("a", id=id, **SVDD)
    found = {id: getattr(event, "reason", "finished") for id, event in last_of(list(one.stream())).items()}
    assert found == {"a": "finished", "b": "finished", "c": "full"}


@pytest.mark.parametrize("reward", ["near", "host"])
def test_an_aborted_request_costs_no_row_more(reward: str) -> None:
    flow = GaussianFlow()
    one = engine(flow, slots=4)
    ids = [one.add_request("a", reward=reward, **SVDD) for _ in range(9)]
    told = one.step() + one.step() + one.step()
    assert all(one.abort(id) for id in ids) and one.abort(ids[0]) and not one.abort("nobody")
    seen = int(flow.seen)
    told += one.stream()
    assert int(flow.seen) == seen
    assert {event.reason for event in last_of(told).values()} == {"aborted"} and set(last_of(told)) == set(ids)
    assert not one.abort(ids[0])


def test_who_waits_and_is_aborted_goes_with_the_next_step() -> None:
    one = engine(slots=1)
    one.add_request("a", id="runs", **SVDD)
    one.add_request("a", id="waits", **SVDD)
    one.step()
    one.abort("waits")
    assert last_of(one.step()).keys() == {"waits"}
    assert last_of(list(one.stream())).keys() == {"runs"}


def test_a_drained_engine_ends_what_it_has_and_takes_no_more() -> None:
    one = engine()
    ids = [one.add_request("a", **SVDD) for _ in range(5)]
    events = last_of(one.drain())
    assert set(events) == set(ids) and all(isinstance(event, flowfast.Finished) for event in events.values())
    with pytest.raises(OptionError, match="takes no more requests"):
        one.add_request("a", **SVDD)


def test_what_a_drain_has_no_time_for_is_aborted(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds, step = [0.0], flowfast.Engine.step
    monkeypatch.setattr(clock, "now", lambda: seconds[0])

    def a_second(self: flowfast.Engine) -> list[Any]:
        seconds[0] += 1.0
        return step(self)

    monkeypatch.setattr(flowfast.Engine, "step", a_second)
    one = engine(slots=1)
    for id in ("short", "long", "waits"):
        one.add_request("a", id=id, priority=-(id == "short"), **{**SVDD, "budget": 12 if id == "short" else 60})
    found = {id: getattr(event, "reason", "finished") for id, event in last_of(one.drain(seconds=9)).items()}
    assert found == {"short": "finished", "long": "aborted", "waits": "aborted"}
    assert seconds[0] <= 11


def test_a_changed_model_needs_a_reload_which_waits_for_no_one() -> None:
    flow = Weighted()
    one = engine(flow)
    one.add_request("a", id="old", **SVDD)
    one.step()
    with torch.no_grad():
        flow.gain.mul_(0.5)
    with pytest.raises(OptionError, match=r"changed under the engine.*reload"):
        one.add_request("a", **SVDD)
    with pytest.raises(OptionError, match=r"1 requests still run on the old model: drain first"):
        one.reload()
    list(one.stream())
    one.reload()
    one.add_request("a", id="new", **SVDD)
    new = last_of(list(one.stream()))["new"].sample
    assert torch.equal(new.latent, alone(flow).latent)


def alone(flow: Any) -> Any:
    one = engine(flow)
    one.add_request("a", **SVDD)
    return list(one.stream())[-1].sample


def test_modules_run_in_evaluation_mode_until_the_engine_is_closed() -> None:
    flow = Weighted().train()
    flow.drop.train()
    with engine(flow) as one:
        assert not flow.training and not flow.drop.training
        one.add_request("a", **SVDD)
        first = list(one.stream())[-1].sample
    assert flow.training and flow.drop.training
    assert torch.equal(first.latent, alone(flow.eval()).latent)


def test_the_host_s_settings_are_no_part_of_a_request() -> None:
    """Inside inference mode, autocast and gradients it has the bits that it has without."""
    flow = GaussianFlow()
    plain = alone(flow)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        inside = alone(flow)
    with torch.enable_grad():
        with_gradients = alone(flow)
    assert torch.equal(plain.latent, inside.latent) and torch.equal(plain.latent, with_gradients.latent)
    assert not with_gradients.latent.requires_grad


def test_a_model_that_fails_ends_its_batch_and_the_engine_goes_on() -> None:
    class Fragile(GaussianFlow):
        broken = False

        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if self.broken and bool((cond["mean"] > 0.5).any()):
                raise RuntimeError("no such token")
            return super().velocity(x_t, t, cond)

    flow = Fragile()
    one = engine(flow)
    for id, prompt in (("beside", "a"), ("guilty", "aaaa"), ("later", "a")):
        one.add_request(prompt, id=id, **SVDD)
    other = one.add_request("a", id="other", reward="host", **SVDD)
    told = one.step() + one.step()
    flow.broken = True
    told += one.stream()
    found = {id: getattr(event, "reason", "finished") for id, event in last_of(told).items()}
    assert found == {"beside": "model", "guilty": "model", "later": "finished", other: "finished"}
    assert "no such token" in str(last_of(told)["guilty"].error)


def test_several_rewards_need_names(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="two rewards have one name"):
        flowfast.Engine(GaussianFlow(), [near, near])
    with pytest.raises(OptionError, match="expected a reward, or several by name"):
        flowfast.Engine(GaussianFlow(), {})
    with pytest.raises(OptionError, match="unknown option 'slot'"):
        flowfast.Engine(GaussianFlow(), near, slot=2)
    one = flowfast.Engine(GaussianFlow(), [near, "sharpness"], max_budget=60)
    assert one.first_reward == "near"
