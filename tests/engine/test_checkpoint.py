"""A search that is killed at any round and called again gives the identical result, and evaluates only the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError, OptionError
from flowfast.prompts import Prompt
from tests.engine.test_call import assert_same, near
from tests.toys import METHODS, GaussianFlow, NearTarget

PROMPTS = ["a", "bb", Prompt("ccc", seed=5), "dddd", "eeeee"]


class Killed(BaseException):
    pass


class Counted(GaussianFlow):
    """Dies at its `life`-th call."""

    def __init__(self, life: float = float("inf")) -> None:
        super().__init__()
        self.calls, self.life = 0, life

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.calls += 1
        if self.calls > self.life:
            raise Killed
        return super().velocity(x_t, t, cond)


def search(flow: Any, path: Path | None, **options: Any) -> flowfast.SearchResult:
    options = {"reward": NearTarget(), "budget": 40, "steps": 6, "slots": 2, "micro_batch": 4, **options}
    return flowfast.search(flow, PROMPTS, checkpoint=path, checkpoint_seconds=0, **options)


def killed(path: Path, life: int, **options: Any) -> None:
    with pytest.raises(Killed):
        search(Counted(life), path, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_a_killed_search_goes_on_to_the_identical_result(tmp_path: Path, method: str, share: float) -> None:
    whole, flow = Counted(), Counted()
    expected = search(whole, None, method=method)
    path = tmp_path / "search.safetensors"
    killed(path, int(share * whole.calls), method=method)
    found = search(flow, path, method=method)
    assert_same(found, expected)
    assert [sample.seed for sample in found.samples] == [0, 0, 5, 0, 0]
    assert flow.calls <= (1 - share) * whole.calls + 8  # the rest, and the rounds that were under way


@pytest.mark.parametrize("method", METHODS)
def test_a_steered_search_goes_on_with_its_parents_gradients(tmp_path: Path, method: str) -> None:
    path, whole, options = tmp_path / "search.safetensors", Counted(), {"method": method, "gradient": "dps:0.5"}
    expected = search(whole, None, **options)
    killed(path, whole.calls // 2, **options)
    assert_same(search(Counted(), path, **options), expected)


def test_killed_again_and_again(tmp_path: Path) -> None:
    path, expected = tmp_path / "search.safetensors", search(Counted(), None, method="smc")
    for _ in range(100):
        flow = Counted(9)
        try:
            found = search(flow, path, method="smc")
            break
        except Killed:
            continue
    assert_same(found, expected)


def test_two_batches_with_a_host_reward_go_on_too(tmp_path: Path) -> None:
    path, options = tmp_path / "search.safetensors", {"method": "rbf", "reward": near, "slots": 4}
    expected = search(Counted(), None, **options)
    killed(path, 20, **options)
    assert_same(search(Counted(), path, **options), expected)


def test_what_is_done_is_given_back_without_a_call(tmp_path: Path) -> None:
    path, told = tmp_path / "search.safetensors", []
    first = search(Counted(), path, method="svdd", top_k=2)
    flow = Counted(0)
    again = search(flow, path, method="svdd", top_k=2, on_sample=lambda index, sample: told.append(index))
    assert_same(first, again)
    assert flow.calls == 0 and not told
    assert first.samples[0].top[1].winner == again.samples[0].top[1].winner


def test_own_latents_go_on_and_others_are_refused(tmp_path: Path) -> None:
    path, latents = tmp_path / "search.safetensors", torch.randn(len(PROMPTS), 3)
    options = {"method": "svdd", "chains": 2}
    expected = search(Counted(), None, latents=latents, **options)
    killed(path, 20, latents=latents, **options)
    with pytest.raises(OptionError, match="latents"):
        search(Counted(), path, latents=latents + 1, **options)
    assert_same(search(Counted(), path, latents=latents, **options), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "with config"),
        ({"method": "bon"}, "with config"),
        ({"micro_batch": 8}, "with micro_batch 4, this one has 8"),
        ({"slots": 1}, "with slots 2, this one has 1"),
    ],
)
def test_another_search_is_refused(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = tmp_path / "search.safetensors"
    killed(path, 20, method="rbf")
    before = path.read_bytes()
    with pytest.raises(OptionError, match=message):
        search(Counted(), path, **{"method": "rbf", **change})
    assert path.read_bytes() == before


def test_damage_is_named(tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(OptionError, match="cannot resume from .*search.safetensors.*remove it to start anew"):
        search(Counted(), path)


# ---- the decoder fails: nothing that was found is lost ----


class NoMemory(ModelError):
    pass


class Fragile(Counted):
    """Its decoder dies at the `images`-th image that is decoded alone, as those that are handed out are."""

    def __init__(self, images: float, life: float = float("inf")) -> None:
        super().__init__(life)
        self.images = images

    def decode(self, x0: Tensor) -> Tensor:
        self.images -= len(x0) == 1
        if self.images < 0:
            raise NoMemory
        return super().decode(x0)


@pytest.mark.parametrize("reward", [NearTarget(), near], ids=["device", "host"])
@pytest.mark.parametrize("method", METHODS)
def test_what_a_decoder_left_undone_is_decoded_and_not_searched_again(tmp_path: Path, method: str, reward: Any) -> None:
    """It dies at the first prompt of the first slots, at a later one, at the last one."""
    options = {"method": method, "reward": reward, "budget": 40, "steps": 6, "slots": 2, "micro_batch": 4}
    whole, told = Counted(), list[int]()
    expected = flowfast.search(whole, PROMPTS, **options)
    for images in (0, 2, 4):
        options["checkpoint"], first = tmp_path / f"{images}.safetensors", Fragile(images)
        for flow in (first, Fragile(0, life=0)):  # it dies there again, without a call of the model
            with pytest.raises(NoMemory):
                flowfast.search(flow, PROMPTS, **options)
        rest = Counted()
        told.clear()
        found = flowfast.search(rest, PROMPTS, on_sample=lambda index, sample: told.append(index), **options)
        assert_same(found, expected)
        assert [sample.reward_calls for sample in found.samples] == [sample.reward_calls for sample in expected.samples]
        assert (found.rounds, found.rows_padded) == (expected.rounds, expected.rows_padded)
        again = 4 if reward is near else 0  # calls of the round of the other batch that was under way
        assert whole.calls <= first.calls + rest.calls <= whole.calls + again
        assert images in told and (images < 4 or (rest.calls == 0 and told == [4]))


def test_a_prompt_that_ended_early_is_still_done_afterwards(tmp_path: Path) -> None:
    """The host knows it from a report, not from the plan."""
    options = {"method": "rbf", "lanes": 1, "budget": 200, "steps": 10, "until": -1e9, "reward": NearTarget()}
    expected = flowfast.search(Counted(), ["bb"], micro_batch=4, **options)
    assert expected.samples[0].nfe < 200
    with pytest.raises(NoMemory):
        flowfast.search(Fragile(0), ["bb"], micro_batch=4, checkpoint=tmp_path / "search.safetensors", **options)
    flow = Counted()
    found = flowfast.search(flow, ["bb"], micro_batch=4, checkpoint=tmp_path / "search.safetensors", **options)
    assert_same(found, expected)
    assert flow.calls == 0


def test_seconds_go_on_as_the_rounds_that_were_planned(tmp_path: Path) -> None:
    path, options = tmp_path / "search.safetensors", {"method": "svdd", "budget": None, "seconds": 0.1}
    with pytest.raises(NoMemory):
        search(Fragile(4), path, **options)
    with pytest.raises(OptionError, match="with seconds 0.1, this one has 0.2"):
        search(Counted(), path, **{**options, "seconds": 0.2})
    flow = Counted(0)
    found = search(flow, path, **options)
    assert flow.calls == 0
    budget = found.config.budget
    assert budget and found.config.seconds is None and found.overshoot is None
    assert all(sample.budget_nfe == budget for sample in found.samples)
    again = flowfast.search(GaussianFlow(), PROMPTS, reward=NearTarget(), config=found.config)
    assert_same(found, again)


def test_the_memory_of_the_model_may_change_on_the_way(tmp_path: Path) -> None:
    """Out of memory in the decoder: the same search goes on with tiles; another size is another search."""
    path, options = tmp_path / "search.safetensors", {"method": "svdd", "model_options": {"height": 64}}
    expected = search(Counted(), None, **options)
    with pytest.raises(NoMemory):
        search(Fragile(3), path, **options)
    with pytest.raises(OptionError, match="with config"):
        search(Counted(), path, **{**options, "model_options": {"height": 32}})
    tiles = {"height": 64, "vae_tiling": True, "offload": "model"}
    assert_same(search(Counted(), path, **{**options, "model_options": tiles}), expected)
