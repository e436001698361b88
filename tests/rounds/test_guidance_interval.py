"""Guidance where it acts: two passes at some transitions, one at the others, whoever stands beside whom."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.config import make_config
from flowfast.errors import OptionError
from flowfast.ops import noise
from flowfast.resolve import resolve
from flowfast.rounds.lanes import Lanes
from tests.toys import METHODS, PROMPTS, GaussianFlow, NearTarget

INTERVAL = "3@0.3:0.8"
OPTIONS: dict[str, Any] = {"steps": 8, "seed": 3, "negative_prompt": "dddd", "guidance": INTERVAL}


class Watched(GaussianFlow):
    """Notes the rows that it sees: time and condition."""

    def __init__(self, poisoned: bool = False, **options: Any):
        super().__init__(**options)
        self.rows: list[tuple[float, float]] = []
        self.poisoned = poisoned

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.rows += zip(t.tolist(), cond["mean"].flatten().tolist(), strict=True)
        u = super().velocity(x_t, t, cond)
        null = torch.isclose(cond["mean"], self.encode(["dddd"])["mean"].to(u))
        outside = ((t < 0.3) | (t > 0.8))[:, None]
        return torch.where(null & outside, torch.nan, u) if self.poisoned else u


def search(method: str, flow: Any = None, prompts: list[str] = PROMPTS[:3], **options: Any) -> flowfast.SearchResult:
    options = {"budget": 60, "micro_batch": 4, "slots": 3, **OPTIONS, **options}
    return flowfast.search(flow or GaussianFlow(), prompts, reward=NearTarget(), method=method, **options)


def test_a_plain_sample_is_the_walk_by_hand() -> None:
    """x and u in float64, guided between the two times only."""
    flow, seen = Watched(), search("ode", Watched(), ["a"], budget=20, micro_batch=1)
    schedule = resolve(flow, make_config({"method": "ode", **OPTIONS}).params).schedule
    a, null = (flow.encode([text])["mean"].double() for text in ("a", "dddd"))
    pictures = flowfast.replay(GaussianFlow(), seen.samples[0], seen.config)
    zero, key = torch.zeros(1, dtype=torch.int64), torch.tensor([seen.samples[0].winner.key])
    z = noise.normals(key, zero, zero, zero, noise.INITIAL_NOISE, 3)
    state, u = schedule.table[0, 2] * z.double(), torch.zeros(1, 3, dtype=torch.float64)
    for k, row in enumerate(schedule.table):
        if k:
            state = row[0] * state + row[1] * u
        time = schedule.time[k].reshape(1)
        u, linear = flow.velocity(state, time, {"mean": a}), float(schedule.linear_time[k])
        if 0.3 <= linear <= 0.8:
            uncond = flow.velocity(state, time, {"mean": null})
            u = uncond + 3 * (u - uncond)
        torch.testing.assert_close(pictures[k][1].double(), (row[4] * state + row[5] * u)[0], rtol=1e-5, atol=1e-5)
    guided = int(((schedule.linear_time >= 0.3) & (schedule.linear_time <= 0.8)).sum())
    assert 0 < guided < 8 and seen.samples[0].nfe == schedule.transitions + guided
    assert seen.samples[0].evaluations == schedule.transitions


@pytest.mark.parametrize("method", METHODS)
def test_the_null_condition_is_asked_only_where_it_acts(method: str) -> None:
    """A model whose null velocity is NaN elsewhere finds the same; rows of padding are no lane's."""
    flow, poisoned = Watched(), Watched(poisoned=True)
    found, other = search(method, flow), search(method, poisoned)
    for one, two in zip(found.samples, other.samples, strict=True):
        assert one.winner == two.winner and torch.equal(one.latent, two.latent)
        assert one.evaluations < one.nfe < 2 * one.evaluations
    assert sum(sample.nfe for sample in found.samples) + found.rows_padded == len(flow.rows)


def test_an_interval_that_holds_all_times_is_none() -> None:
    for method in ("bon", "rbf"):
        found, whole = (search(method, guidance=guidance) for guidance in ("3@0:1", 3.0))
        for one, two in zip(found.samples, whole.samples, strict=True):
            assert torch.equal(one.latent, two.latent) and one.nfe == two.nfe == 2 * one.evaluations


@pytest.mark.parametrize("method", METHODS)
def test_a_prompt_has_the_same_bits_alone_and_the_replay_too(method: str) -> None:
    together = search(method)
    for sample in together.samples:
        alone = search(method, prompts=[sample.prompt], slots=1).samples[0]
        assert alone.winner == sample.winner and torch.equal(alone.latent, sample.latent) and alone.nfe == sample.nfe
        assert torch.equal(flowfast.replay(GaussianFlow(), sample, together.config)[-1][1], sample.image)


def test_lanes_that_take_their_neighbours_null_velocity_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant."""
    wanted, keep = search("rbf"), Lanes.keep_null
    monkeypatch.setattr(Lanes, "keep_null", lambda self, i, u: keep(self, i, u.roll(1, 0)))
    found = search("rbf")
    assert any(not torch.equal(a.latent, b.latent) for a, b in zip(found.samples, wanted.samples, strict=True))


def test_a_search_may_also_be_steered() -> None:
    found = search("svdd", guidance=f"{INTERVAL},dps:0.1", micro_batch=1)
    for sample in found.samples:
        assert sample.evaluations < sample.nfe < 2 * sample.evaluations
        again = flowfast.replay(GaussianFlow(), sample, found.config, reward=NearTarget())
        assert torch.equal(again[-1][1], sample.image)
    plain = search("svdd", micro_batch=1)
    assert any(not torch.equal(a.latent, b.latent) for a, b in zip(found.samples, plain.samples, strict=True))


def test_requests_of_other_intervals_share_no_batch_and_all_find_their_own() -> None:
    engine = flowfast.Engine(GaussianFlow(), NearTarget(), slots=2, micro_batch=4, max_budget=60)
    asked = {"one": 1.0, "everywhere": 3.0, "some": INTERVAL, "weaker": "2@0.3:0.8"}
    for name, guidance in asked.items():
        engine.add_request("a", id=name, method="rbf", budget=60, **{**OPTIONS, "guidance": guidance})
    last = {event.id: event.sample for event in engine.stream() if isinstance(event, flowfast.Finished)}
    assert len(engine.core.scheduler.batches) == 3  # the scale is the request's own
    for name, guidance in asked.items():
        sample = search("rbf", prompts=["a"], slots=2, guidance=guidance).samples[0]
        assert torch.equal(last[name].latent, sample.latent) and last[name].nfe == sample.nfe


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"guidance": "3@0.97:0.98"}, "guidance acts nowhere: no evaluation has a linear t in 0.97..0.98"),
        ({"guidance": "3@0.8:0.3"}, "exchange its ends"),
        ({"guidance": "3@0.8"}, "expected two ends of linear t behind @"),
        ({"guidance": "3@0.8:1.2"}, "guidance_interval"),
        ({"guidance": "3@a:b"}, "expected a finite number, got 'a'"),
        ({"guidance": INTERVAL, "guidance_interval": (0.2, 0.3)}, "give one of them"),
    ],
)
def test_wrong_intervals_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        search("bon", **options)


def test_without_guidance_there_is_no_interval() -> None:
    found = search("bon", guidance="1@0.3:0.8")
    assert found.config.guidance_interval is None and all(s.nfe == s.evaluations for s in found.samples)
