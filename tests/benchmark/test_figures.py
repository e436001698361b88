"""What `flowfast bench` says of a run: percentiles, rates, fill, shares; and what it counts on a real engine."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast import rewards
from flowfast.benchmark.run import Run, Served, Workload, latency, serve, throughput
from flowfast.benchmark.statistics import best, figures, ratio, spread
from flowfast.config import Rerun, make_config
from flowfast.engine import clock
from flowfast.engine.engine import Engine
from flowfast.errors import OptionError, PromptError, RewardError

COST = 6
"""NFE of a plain sample in 4 steps, of which the last two end where a sample is finished."""


def silent(*_: object) -> None:
    pass


def work(prompts: tuple[str, ...] = ("a", "bb", "ccc"), reward: Any = "sharpness", **options: Any) -> Workload:
    """Plain samples, which cost as many NFE as there are steps, of a model that is a line."""
    flow = flowfast.flow_from(
        lambda x_t, t, cond: x_t * cond["length"].view(-1, 1, 1, 1),
        (3, 8, 8),
        decode=lambda x: x.mul(0.1).add(0.5).clamp(0, 1),
        encode=lambda texts: {"length": torch.tensor([0.5 + 0.1 * len(text) for text in texts])},
    )
    config = make_config({"method": "ode", "budget": COST, "steps": 4, **options})
    return Workload(config, prompts, flow, rewards.load(reward, flow))


# ---- of known figures ----


def test_percentiles_are_those_between_the_two_values_beside_them() -> None:
    values = [float(value) for value in range(1, 101)]
    random.Random(0).shuffle(values)
    assert spread(values) == pytest.approx(
        {"mean": 50.5, "p50": 50.5, "p95": 95.05, "p99": 99.01, "least": 1.0, "most": 100.0}, rel=1e-12
    )
    skewed = [random.Random(seed).expovariate(3.0) for seed in range(37)]
    cuts = statistics.quantiles(skewed, n=100, method="inclusive")
    found = spread(skewed)
    assert found is not None
    assert [found["p50"], found["p95"], found["p99"]] == pytest.approx([cuts[49], cuts[94], cuts[98]], rel=1e-12)
    assert found["mean"] == pytest.approx(statistics.fmean(skewed))
    assert set(spread([2.0]).values()) == {2.0}  # type: ignore[union-attr]
    assert spread([]) is None


def test_rates_fill_and_shares_of_a_run() -> None:
    served = [Served(1.0, 0.5, 30, 1), Served(3.0, None, 50, 2)]
    found = figures(Run(served, seconds=4.0, rows=100, parts={"model": 2.0, "decode": 1.0, "reward": 0.4, "search": 0}))
    assert (found["requests_per_s"], found["images_per_s"], found["nfe_per_s"], found["fill"]) == (0.5, 0.75, 20, 0.8)
    assert found["latency_s"]["mean"] == 2.0
    assert found["first_sample_s"]["mean"] == 0.5  # of those that had one
    assert found["share"] == pytest.approx({"model": 0.5, "decode": 0.25, "reward": 0.1, "search": 0.0, "rest": 0.15})
    assert math.isclose(sum(found["share"].values()), 1.0)


def test_the_ratio_is_of_turns_and_above_one_where_the_engine_is_faster() -> None:
    run = Run([Served(1.0, None, 1, 1), Served(2.0, None, 1, 1), Served(4.0, None, 1, 1)])
    assert ratio([2.0, 4.0, 40.0], run) == 2.0


def test_the_best_setting_has_the_most_requests_a_second() -> None:
    assert best([{"requests_per_s": rate} for rate in (2.0, 5.0, 3.0, 5.0)]) == 1


# ---- of an engine ----


@pytest.mark.parametrize(
    ("slots", "micro_batch", "fill"), [(2, 2, 1.0), (4, 2, 1.0), (2, 3, 2 / 3), (1, 4, 1 / 4), (3, 2, 3 / 4)]
)
def test_fill_is_one_where_the_micro_batch_divides_and_padding_is_counted(
    slots: int, micro_batch: int, fill: float
) -> None:
    """A plain sample is a row a round, so slots rows are live."""
    (found,) = throughput(work(), [(slots, micro_batch)], 12, None, 1, silent)
    shown = figures(found.run)
    assert (shown["nfe"], shown["requests"]) == (12 * COST, 12)
    assert shown["fill"] == pytest.approx(fill, rel=1e-12)
    assert shown["rows"] * fill == pytest.approx(12 * COST)
    assert (found.slots_held, found.micro_batch_held) == (slots, micro_batch)


def test_of_classifier_free_guidance_both_passes_count() -> None:
    (found,) = throughput(work(guidance=3.0, budget=2 * COST), [(2, 2)], 4, 0, 2, silent)
    assert (figures(found.run)["nfe"], found.run.rows) == (4 * 2 * COST, 4 * 2 * COST)


def test_what_warms_up_is_not_counted() -> None:
    """Neither its requests nor its rows; one at a time it fills a quarter of its rows."""
    for warmup in (0, 1, 5):
        (many,) = throughput(work(), [(4, 4)], 8, warmup, 2, silent)
        one = latency(work(micro_batch=4), 3, warmup, None, silent)
        assert (len(many.run.served), many.run.rows) == (8, 8 * COST)
        assert (len(one.run.served), one.run.rows) == (3, 3 * COST * 4)


def test_time_is_counted_in_the_run_and_from_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that each look at it moves on, so that nothing depends on the machine."""
    looks = itertools.count()
    monkeypatch.setattr(clock, "now", lambda: float(next(looks)))
    run = latency(work(("a",)), 3, 2, None, silent).run
    own = [each.latency for each in run.served]
    assert len(set(own)) == 1  # the same work
    assert sum(own) < run.seconds < sum(own) + 30  # what is between requests is little, and warming up is not in it
    assert all(each.first_sample is not None and 0 < each.first_sample < each.latency for each in run.served)
    assert 0 < sum(run.parts.values()) < run.seconds


class Scripted:
    """In the place of an engine: a request is told of samples after 2 and 5 steps and ends after 7, each a second."""

    def __init__(self) -> None:
        self.core, self.loaded = SimpleNamespace(rows_seen=0), SimpleNamespace(clock=SimpleNamespace(read=self.read))
        self.steps, self.ends = 0, dict[str, int]()

    def read(self) -> dict[str, float]:
        """Half of each second is the model's, which has worked before."""
        return {"model": 100 + 0.5 * self.steps}

    def add_request(self, prompt: str) -> str:
        self.ends[prompt] = self.steps + 7
        return prompt

    def step(self) -> list[Any]:
        self.steps += 1
        self.core.rows_seen += 4
        events: list[Any] = []
        for name, end in list(self.ends.items()):
            if end - self.steps in (5, 2):
                events.append(flowfast.Found(name, 0.5, 8))
            if end == self.steps:
                sample: Any = SimpleNamespace(nfe=8, top=(None, None))
                events.append(flowfast.Finished(name, sample, Rerun(), 99.0))
                del self.ends[name]
        return events


def test_latency_and_the_first_sample_are_from_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, run = Scripted(), Run()
    monkeypatch.setattr(clock, "now", lambda: float(engine.steps))
    serve(engine, [{"prompt": name} for name in "abc"], 2, run)  # type: ignore[arg-type]
    assert run.served == [Served(7.0, 2.0, 8, 2)] * 3  # the third came as one of the others ended
    assert (run.seconds, run.rows, run.parts) == (14.0, 4 * 14, {"model": 7.0})
    serve(engine, [{"prompt": "d"}], 1, run)  # type: ignore[arg-type]
    assert (len(run.served), run.seconds, run.rows, run.parts) == (4, 21.0, 4 * 21, {"model": 10.5})


def test_so_many_are_under_way_as_there_are_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    under_way, most = set[str](), 0
    add, step = Engine.add_request, Engine.step

    def added(engine: Engine, prompt: str, **params: Any) -> str:
        nonlocal most
        under_way.add(name := add(engine, prompt, **params))
        most = max(most, len(under_way))
        return name

    def stepped(engine: Engine) -> list[Any]:
        assert engine.core.scheduler.count <= 3
        events = step(engine)
        assert engine.core.scheduler.count == 0  # nobody waits for a slot
        under_way.difference_update(event.id for event in events if isinstance(event, flowfast.Finished))
        return events

    monkeypatch.setattr(Engine, "add_request", added)
    monkeypatch.setattr(Engine, "step", stepped)
    throughput(work(), [(3, 3)], 10, 0, 1, silent)
    assert most == 3 and not under_way


def test_prompts_begin_again_and_every_request_has_a_seed_of_its_own() -> None:
    found = work(("a", "b"), seed=7).requests(5)
    assert [each["prompt"] for each in found] == ["a", "b", "a", "b", "a"]
    assert [each["seed"] for each in found] == [7, 8, 9, 10, 11]
    assert {each["method"] for each in found} == {"ode"}


def test_every_setting_is_run_with_the_same_requests_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, asked = [(1, 2), (2, 2), (2, 4)], list[int]()
    told: list[tuple[int, int, str]] = []
    add = Engine.add_request

    def added(engine: Engine, prompt: str, **params: Any) -> str:
        asked.append(params["seed"])
        return add(engine, prompt, **params)

    monkeypatch.setattr(Engine, "add_request", added)
    found = throughput(work(), settings, 5, 0, 2, lambda *args: told.append(args))
    assert [(each.slots, each.micro_batch) for each in found] == settings
    assert {figures(each.run)["nfe"] for each in found} == {5 * COST}
    assert [done for done, of, _ in told if of == 15] == sorted(done for done, _, _ in told)
    assert told[-1][:2] == (15, 15)
    turns = [[0, 1] * 3, [2, 3, 4] * 3]
    assert asked == turns[0] + turns[1]
    order = list(dict.fromkeys(text.removesuffix(": warming up") for _, _, text in told))
    forth = [f"{slots} slots, micro-batch {rows}" for slots, rows in settings]
    assert order == [f"turn 1: {text}" for text in forth] + [f"turn 2: {text}" for text in reversed(forth)]


def test_a_machine_that_becomes_slower_does_so_for_all_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock whose seconds become longer; the two settings are the same one."""

    def ratio_of(turns: int) -> float:
        looks = itertools.count()
        monkeypatch.setattr(clock, "now", lambda: 1e-3 * (at := next(looks)) + 1e-6 * at * at)
        first, second = (figures(each.run) for each in throughput(work(), [(2, 2)] * 2, 12, 0, turns, silent))
        return first["requests_per_s"] / second["requests_per_s"]

    assert ratio_of(1) > 1.3
    assert ratio_of(2) == pytest.approx(1.0, rel=0.03)


def test_what_turns_say() -> None:
    (found,) = throughput(work(), [(2, 2)], 6, 0, 3, silent)
    assert len(found.rates) == 3
    assert sum(2 / rate for rate in found.rates) == pytest.approx(found.run.seconds)
    with pytest.raises(OptionError, match="at least a request a turn"):
        throughput(work(), [(2, 2)], 2, 0, 3, silent)


def test_a_request_that_fails_ends_the_benchmark() -> None:
    def reward(images: Tensor, prompts: Any) -> Tensor:
        raise ValueError("no")

    failing = work(reward=reward)
    with failing.engine(2, 2) as engine, pytest.raises(RewardError, match="no"):
        serve(engine, failing.requests(3), 2, Run())


def test_prompts_are_checked_before_anything_runs() -> None:
    def encode(texts: list[str]) -> dict[str, Tensor]:
        if "bad" in texts:
            raise PromptError("cannot read 'bad'")
        return {"length": torch.ones(len(texts))}

    flow = flowfast.flow_from(lambda x_t, t, cond: x_t, (3, 8, 8), decode=lambda x: x.clamp(0, 1), encode=encode)
    good = work()
    with pytest.raises(PromptError, match="prompt 2 of 3: cannot read 'bad'"):
        Workload(good.config, ("a", "bad", "c"), flow, good.scorer).check()
    good.check()
