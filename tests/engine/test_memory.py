"""Out of memory at any round, in model, decoder or reward: the search goes on from before the round with half of the
micro-batch, and finds what it would have found (testing.md F3). The toys' rows do not depend on their batch."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.engine import clock as clocks
from flowfast.engine import loaded
from flowfast.errors import ModelError, OptionError
from flowfast.rounds.batch import SlotBatch
from tests.engine.test_call import assert_same, near
from tests.engine.test_graphs import CpuRecorder
from tests.toys import METHODS, GaussianFlow, NearTarget

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
OPTIONS = {"budget": 30, "steps": 6, "slots": 4, "micro_batch": 8}


class Memory:
    """Holds `most` rows from the `after`-th call that asks for it on; 0: a call fails whatever its size."""

    def __init__(self, most: float = math.inf, after: int = 0) -> None:
        self.most, self.after, self.calls, self.failures = most, after, 0, 0

    def ask(self, rows: int) -> None:
        self.calls += 1
        if rows > self.most and self.calls > self.after:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Hungry(GaussianFlow):
    """Velocity and decoder ask for memory. A sample that is handed out is decoded alone."""

    def __init__(self, velocity: Memory | None = None, decode: Memory | None = None) -> None:
        super().__init__()
        self.memory = velocity or Memory(), decode or Memory()
        self.rows: list[int] = []

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.memory[0].ask(len(x_t))
        self.rows.append(len(x_t))
        return super().velocity(x_t, t, cond)

    def decode(self, x0: Tensor) -> Tensor:
        self.memory[1].ask(len(x0))
        return super().decode(x0)


class HungryReward(NearTarget):
    def __init__(self, memory: Memory) -> None:
        super().__init__()
        self.memory = memory

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.memory.ask(len(images))
        return super().forward(images, t, cond)


def hungry_host(memory: Memory) -> Callable[[Tensor, list[str]], Tensor]:
    def score(images: Tensor, prompts: list[str]) -> Tensor:
        memory.ask(len(images))
        return near(images, prompts)

    return score


def parts(where: str, memory: Memory, host: bool) -> tuple[Hungry, Any]:
    """A flow and a reward, one of which asks for memory."""
    if where == "reward":
        return Hungry(), hungry_host(memory) if host else HungryReward(memory)
    return Hungry(**{where: memory}), near if host else NearTarget()


@pytest.mark.parametrize("host", [False, True], ids=["one batch", "two batches"])
@pytest.mark.parametrize("where", ["velocity", "decode", "reward"])
@pytest.mark.parametrize("method", METHODS)
def test_it_goes_on_to_the_same_result(method: str, where: str, host: bool) -> None:
    """At the first round and later; records are told once, in order; the budget stays exact."""
    plain_told: list[Any] = []
    plain = Memory()
    flow, reward = parts(where, plain, host)
    options = {**OPTIONS, "method": method, "score_all": where != "velocity"}  # decoder and reward in every round
    expected = flowfast.search(flow, PROMPTS, reward=reward, on_round=plain_told.extend, **options)
    for share in (0.0, 0.6):
        told: list[Any] = []
        memory = Memory(most=3, after=int(share * plain.calls))
        flow, reward = parts(where, memory, host)
        found = flowfast.search(flow, PROMPTS, reward=reward, on_round=told.extend, **options)
        assert_same(found, expected)
        costs = [
            [(sample.nfe, sample.reward_calls, sample.unspent) for sample in result.samples]
            for result in (found, expected)
        ]
        assert costs[0] == costs[1] and found.rounds == expected.rounds
        assert sorted(told) == sorted(plain_told)
        if where != "reward" or not host:  # which sees live lanes only, and may never see more than 3
            assert memory.failures and found.micro_batch == 2
            assert bool(found.config.splits) == bool(share)
        else:
            assert (found.micro_batch < 8) == bool(memory.failures)


@pytest.mark.parametrize("method", ["rbf", "smc", "sop"])
def test_a_steered_search_keeps_its_gradients(method: str) -> None:
    options = {"method": method, "gradient": "dps:0.1", **OPTIONS}
    plain = Memory()
    expected = flowfast.search(Hungry(plain), PROMPTS, reward=NearTarget(), **options)
    memory = Memory(most=3, after=int(0.6 * plain.calls))
    found = flowfast.search(Hungry(memory), PROMPTS, reward=NearTarget(), **options)
    assert_same(found, expected)
    assert memory.failures and found.micro_batch == 2 and found.config.splits


@pytest.mark.parametrize("host", [False, True], ids=["one batch", "two batches"])
@pytest.mark.parametrize("method", ["rbf", "smc", "sop", "bon"])
def test_a_rerun_repeats_the_micro_batches(method: str, host: bool) -> None:
    """Which rounds ran at which size is in the configuration: the model is called with the same rows again."""
    memory = Memory(most=3, after=12)
    flow, reward = parts("velocity", memory, host)
    found = flowfast.search(flow, PROMPTS, reward=reward, method=method, **OPTIONS)
    (rounds, rows), *more = found.config.splits
    assert 0 < rounds < found.rounds and rows == 8 and not more  # 4 failed in the same round
    assert found.config.micro_batch == found.micro_batch == 2 and memory.failures == 2
    again, reward = parts("velocity", Memory(), host)
    repeated = flowfast.search(again, PROMPTS, reward=reward, config=found.config)
    assert_same(repeated, found)
    assert repeated.config == found.config and repeated.rows_padded == found.rows_padded
    begun = flow.rows.index(2)  # what ran before in the round that failed ran for nothing
    assert again.rows[again.rows.index(2) :] == flow.rows[begun:] and set(again.rows) == {8, 2}
    assert again.rows.count(8) <= flow.rows.count(8)
    for sample in found.samples:
        assert torch.equal(flowfast.replay(again, sample, found.config)[-1][1], sample.image)


def test_less_and_less_memory_leaves_one_entry_a_size() -> None:
    class Shrinking(Hungry):
        """8 rows, then 4 from the 10th call on, 2 from the 24th."""

        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            self.memory[0].most = 8 if len(self.rows) < 10 else 4 if len(self.rows) < 24 else 2
            return super().velocity(x_t, t, cond)

    flow = Shrinking(Memory(8))
    found = flowfast.search(flow, PROMPTS, reward=NearTarget(), method="rbf", **OPTIONS)
    assert [rows for _, rows in found.config.splits] == [8, 4] and found.micro_batch == 2
    assert_same(found, flowfast.search(Hungry(), PROMPTS, reward=NearTarget(), method="rbf", **OPTIONS))
    again = Hungry()
    assert_same(flowfast.search(again, PROMPTS, reward=NearTarget(), config=found.config), found)
    assert sorted(set(again.rows)) == [2, 4, 8]


def test_it_is_said_and_remembered(caplog: pytest.LogCaptureFixture) -> None:
    flow, options = Hungry(Memory(3)), {"reward": NearTarget(), "method": "rbf", "budget": 40, "steps": 6}
    found = flowfast.search(flow, PROMPTS, **options)
    assert found.micro_batch == found.config.micro_batch == 2 and not found.config.splits
    assert [record.args for record in caplog.records] == [(16, 8), (8, 4), (4, 2)]
    assert_same(found, flowfast.search(GaussianFlow(), PROMPTS, micro_batch=2, **options))
    caplog.clear()
    assert flowfast.search(flow, PROMPTS, **options).micro_batch == 2 and not caplog.records


def test_a_reward_on_the_host_gets_no_more_images_at_once_than_fit() -> None:
    seen: list[int] = []
    memory = Memory(most=5)

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        memory.ask(len(images))
        seen.append(len(images))
        return near(images, prompts)

    options = {"method": "bon", "budget": 60, "steps": 6, "slots": 2, "micro_batch": 8, "overlap": False}
    found = flowfast.search(GaussianFlow(), PROMPTS[:2], reward=score, **options)
    assert memory.failures == 1 and max(seen) == 4 and sum(seen) == sum(s.reward_calls for s in found.samples)
    assert_same(found, flowfast.search(GaussianFlow(), PROMPTS[:2], reward=near, **options))


@pytest.mark.parametrize("where", ["velocity", "decode", "reward"])
def test_down_to_one_row_and_then_one_clear_error(where: str, caplog: pytest.LogCaptureFixture) -> None:
    for after, rounds in ((0, 0), (12, "[1-9]")):
        flow, reward = parts(where, Memory(0, after), host=False)
        with pytest.raises(ModelError, match=f"micro-batches of 1 after {rounds}.* rounds: choose a smaller"):
            flowfast.search(flow, PROMPTS, reward=reward, method="rbf", **OPTIONS)
    assert [record.args for record in caplog.records] == [(8, 4), (4, 2), (2, 1)] * 2


def test_where_a_smaller_micro_batch_is_no_help_is_said_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The last decoding has one row; a decision has changed the state when it fails."""

    class Alone(GaussianFlow):
        def decode(self, x0: Tensor) -> Tensor:
            if len(x0) == 1:
                raise torch.OutOfMemoryError
            return super().decode(x0)

    path, options = tmp_path / "search.safetensors", {"reward": NearTarget(), "method": "rbf", **OPTIONS}
    with pytest.raises(ModelError, match=f"as a sample was decoded: .* or vae_tiling; {path} has what was found"):
        flowfast.search(Alone(), PROMPTS, checkpoint=path, **options)
    expected = flowfast.search(GaussianFlow(), PROMPTS, **options)
    assert_same(flowfast.search(GaussianFlow(), PROMPTS, checkpoint=path, **options), expected)

    def decide(self: Any, rewards: Tensor) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(SlotBatch, "decide", decide)
    with pytest.raises(ModelError, match="after 0 rounds, as it decided on one: "):
        flowfast.search(GaussianFlow(), PROMPTS, **options)
    assert not caplog.records


@pytest.mark.parametrize("method", ["rbf", "smc"])
def test_with_graphs_too(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A round that is captured whole counts on the host only when it has run."""
    recorder = CpuRecorder()
    monkeypatch.setattr(loaded, "recorder_for", lambda device, wanted: recorder if wanted else None)
    expected = flowfast.search(GaussianFlow(), PROMPTS, reward=NearTarget(), method=method, **OPTIONS)
    for after in (0, 1):  # the warm-up; a capture, and what then runs without one
        flow = Hungry(Memory(3, after))
        found = flowfast.search(flow, PROMPTS, reward=NearTarget(), method=method, **OPTIONS)
        assert_same(found, expected)
        assert found.micro_batch == 2 and found.rounds == expected.rounds and flow.memory[0].failures
    assert recorder.replays


@pytest.mark.parametrize("after", [0, 150], ids=["while the pace is measured", "on the way"])
def test_a_budget_in_seconds_goes_on_by_the_same_clock(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """A row takes a millisecond whatever the micro-batch, so nothing has to be cut; the round that failed is lost."""
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(clocks, "now", lambda: clock.now)

    class Timed(Hungry):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            try:
                u = super().velocity(x_t, t, cond)
            except torch.OutOfMemoryError:
                clock.now += 0.0 if after else 100.0
                raise
            clock.now += 0.001 * len(x_t)
            return u

    flow, seconds = Timed(Memory(3, after)), 0.4 * len(PROMPTS)
    options = {"reward": NearTarget(), "method": "svdd", "seconds": 0.4, "steps": 6, "micro_batch": 8}
    rounds = [0.0]
    found = flowfast.search(flow, PROMPTS, on_round=lambda told: rounds.append(clock.now), **options)
    longest = max(end - begin for begin, end in zip(rounds[1:-1], rounds[2:], strict=True))
    assert flow.memory[0].failures == 2 and found.micro_batch == 2 and bool(found.config.splits) == bool(after)
    assert found.overshoot is not None and found.seconds["total"] == pytest.approx(seconds + found.overshoot)
    assert -0.5 * seconds < found.overshoot <= longest + 1e-9 and not found.config.cuts
    monkeypatch.undo()
    config = found.config.model_copy(update={"seconds": None, "budget": found.samples[0].budget_nfe})
    assert_same(flowfast.search(GaussianFlow(), PROMPTS, reward=NearTarget(), config=config), found)


@pytest.mark.parametrize("asked", [None, 8])
def test_killed_after_that_it_goes_on_as_it_was(tmp_path: Path, asked: int | None) -> None:
    class Killed(BaseException):
        pass

    class Mortal(Hungry):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            if len(self.rows) > 30:
                raise Killed
            return super().velocity(x_t, t, cond)

    path, options = tmp_path / "search.safetensors", {**OPTIONS, "micro_batch": asked, "method": "rbf"}
    options |= {"checkpoint": path, "checkpoint_seconds": 0, "reward": NearTarget()}
    with pytest.raises(Killed):
        flowfast.search(Mortal(Memory(3, 10)), PROMPTS, **options)
    with pytest.raises(OptionError, match="with micro_batch 2, this one has 4"):
        flowfast.search(Hungry(), PROMPTS, **{**options, "micro_batch": 4})
    flow = Hungry()
    found = flowfast.search(flow, PROMPTS, **options)
    assert set(flow.rows) == {2} and len(found.config.splits) == 1
    assert_same(found, flowfast.search(GaussianFlow(), PROMPTS, reward=NearTarget(), method="rbf", **OPTIONS))
