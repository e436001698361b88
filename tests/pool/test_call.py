"""`flowfast.search(pool=True)`: the bits of searches of its waves, whatever the order, the slots and the kills."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import BudgetError, FlowfastError, ModelError, OptionError
from flowfast.pool import call as pool_call
from flowfast.types import Candidate
from tests.toys import GaussianFlow, NearTarget

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee", "ffffff", "ggggggg", "hhhhhhhh"]
METHODS = ["bon", "prune", "svdd", "rbf", "smc", "code", "sop"]


class Endless(NearTarget):
    """Does not say how good it can be."""

    def __init__(self) -> None:
        super().__init__()
        self.range = (-math.inf, math.inf)


def search(prompts: list[str] = PROMPTS, **options: Any) -> flowfast.SearchResult:
    options = {"method": "prune", "budget": 60, "steps": 6, "micro_batch": 4, "pool": True, **options}
    reward = options.pop("reward", NearTarget())
    return flowfast.search(GaussianFlow(), prompts, reward=reward, **options)


def assert_same(one: flowfast.SearchResult, other: flowfast.SearchResult) -> None:
    left, right = ({sample.prompt: sample for sample in result.samples} for result in (one, other))
    assert left.keys() == right.keys()
    for prompt, sample in left.items():
        again = right[prompt]
        assert (sample.winner, sample.nfe, sample.waves) == (again.winner, again.nfe, again.waves)
        assert torch.equal(sample.image, again.image) and sample.reward == again.reward


@pytest.mark.parametrize("method", METHODS)
def test_what_a_prompt_gets_is_the_best_of_the_searches_of_its_waves(method: str) -> None:
    found = search(method=method, pool_wave=24)
    assert len({sample.waves for sample in found.samples}) > 1  # some get more than others
    for sample in found.samples:
        one = {"method": method, "pool": False, "budget": 24}
        first = [wave * chains_of(method) for wave in range(sample.waves)]
        alone = [search([sample.prompt], **one, first_chain=chain).samples[0] for chain in first]
        best = max(alone, key=lambda each: each.reward)
        assert torch.equal(sample.image, best.image) and sample.winner == best.winner
        assert sample.nfe == sum(each.nfe for each in alone) and sample.unspent == 60 - sample.nfe
        assert torch.equal(flowfast.replay(GaussianFlow(), sample, found.config)[-1][1], sample.image)


def chains_of(method: str) -> int:
    """Of a wave of 24 NFE."""
    seen = set[int]()
    search(["a"], method=method, pool=False, budget=24, on_round=lambda of: seen.update(c.chain for c in of))
    return len(seen)


@pytest.mark.parametrize("method", ["bon", "prune", "rbf"])
def test_nothing_beyond_the_whole_budget_is_spent(method: str) -> None:
    found = search(method=method)
    assert sum(sample.nfe for sample in found.samples) <= 60 * len(PROMPTS)
    assert all(sample.nfe <= 6 * 60 for sample in found.samples)
    assert sum(sample.unspent for sample in found.samples) < found.samples[0].nfe  # no wave was left


def test_the_order_of_prompts_does_not_matter_nor_do_slots() -> None:
    found = search()
    assert_same(found, search(PROMPTS[::-1]))
    assert_same(found, search(slots=3))
    assert_same(found, search([PROMPTS[at] for at in (3, 1, 4, 0, 5, 7, 2, 6)], slots=1))


def test_a_rerun_of_its_configuration_gives_the_same() -> None:
    found = search()
    assert_same(found, search(config=found.config))


def test_equal_prompts_are_searched_once_and_their_budget_is_in_the_pool() -> None:
    twice = search([*PROMPTS, "bb", "bb"])
    assert twice.samples[1].winner == twice.samples[8].winner == twice.samples[9].winner
    spent = {sample.prompt: sample.nfe for sample in twice.samples}
    assert 60 * len(PROMPTS) < sum(spent.values()) <= 60 * 10


def test_another_seed_of_a_prompt_is_another_prompt() -> None:
    from flowfast.prompts import Prompt

    found = search([*PROMPTS[:4], Prompt("a", seed=3)])  # type: ignore[call-arg]
    assert found.samples[0].winner.key != found.samples[4].winner.key


def test_a_prompt_without_a_reward_does_not_eat_the_pool() -> None:
    class Lost(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            rewards = super().forward(images, t, cond)
            return torch.where(cond["target"].flatten() == 2.0, torch.nan, rewards)  # of "a", "dddd", "ggggggg"

    calls: list[int] = []
    with pytest.raises(ModelError, match="'a'.*3 such prompts"):
        search(reward=Lost(), on_round=lambda of: calls.extend(c.prompt for c in of if c.transition == 0))
    assert {index: calls.count(index) for index in (0, 3, 6)} == {0: 4, 3: 4, 6: 4}  # four scouts of one wave
    assert max(calls.count(index) for index in (1, 2)) > 4


def test_rounds_and_costs_are_told_as_of_one_search() -> None:
    seen: list[Candidate] = []
    progress: list[tuple[int, int]] = []
    samples: dict[int, flowfast.Sample] = {}
    found = search(
        on_round=seen.extend, on_sample=lambda i, sample: samples.update({i: sample}),
        on_progress=lambda nfe, whole: progress.append((nfe, whole)),
    )  # fmt: skip
    for index, sample in enumerate(found.samples):
        own = [each for each in seen if each.prompt == index]
        assert [each.round for each in own] == sorted(each.round for each in own)
        assert own[-1].nfe == sample.nfe and [each.nfe for each in own] == sorted(each.nfe for each in own)
        assert {each.chain for each in own} == set(range(4 * sample.waves))
        assert max(each.reward or -math.inf for each in own if each.finished) == sample.reward
        assert samples[index].winner == sample.winner and samples[index].nfe == sample.nfe
    assert progress == sorted(progress) and progress[-1] == (sum(s.nfe for s in found.samples), 60 * len(PROMPTS))


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 2, 5, 9, 14, 30, 60])
def test_a_call_that_is_killed_anywhere_goes_on_to_the_same_result(after: int, tmp_path: Path) -> None:
    """Killed after so many rounds, again and again, until it is done."""
    path, told = tmp_path / "checkpoint", dict[int, int]()
    whole = search()

    def kill(counter: itertools.count[int]) -> Any:
        def on_round(_: list[Candidate]) -> None:
            if next(counter) >= after:
                raise Killed

        return on_round

    for _ in range(200):
        try:
            found = search(
                checkpoint=path, checkpoint_seconds=0, on_round=kill(itertools.count()),
                on_sample=lambda index, _: told.update({index: told.get(index, 0) + 1}),
            )  # fmt: skip
            break
        except Killed:
            continue
    assert_same(found, whole)
    assert set(told) == set(range(len(PROMPTS)))
    assert not path.with_name("checkpoint.wave").exists()
    again = search(checkpoint=path)  # of a call that is done
    assert_same(again, whole)


def test_a_checkpoint_of_another_pool_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint"
    search(checkpoint=path)
    for other in ({"pool_wave": 20}, {"budget": 70}, {"seed": 1}, {"pool": False}):
        with pytest.raises(OptionError, match="cannot resume"):
            search(checkpoint=path, **other)


WRONG: list[tuple[dict[str, Any], type[FlowfastError], str]] = [
    ({"reward": Endless()}, OptionError, "range"),
    ({"seconds": 1.0, "budget": None}, OptionError, "in NFE, got one in seconds"),
    ({"first_chain": 4}, OptionError, "first_chain and pool"),
    ({"pool_wave": 61}, BudgetError, "61 NFE is more than the 60"),
    ({"pool_wave": 3}, BudgetError, "at least"),
    ({"budget": 3}, BudgetError, "at least"),
    ({"latents": torch.zeros(8, 1, 1, 1)}, OptionError, "latents"),
]


@pytest.mark.parametrize(("options", "error", "text"), WRONG)
def test_what_does_not_go_together_is_said(options: dict[str, Any], error: type[FlowfastError], text: str) -> None:
    with pytest.raises(error, match=text):
        search(**options)


def test_a_wave_that_repeats_chains_would_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: every wave takes chains 0 to m - 1."""
    original = pool_call.Call

    def forgetful(*args: Any, **named: Any) -> Any:
        return original(*args, **{**named, "first_chains": [0] * len(named["first_chains"])})

    monkeypatch.setattr(pool_call, "Call", forgetful)
    found = search()
    assert all(sample.winner.chain < 4 for sample in found.samples)
    monkeypatch.undo()
    assert any(sample.winner.chain >= 4 for sample in search().samples)
