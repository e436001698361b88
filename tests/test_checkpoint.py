"""A search that is killed at any round and called again gives the identical result, and evaluates only the rest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import OptionError
from flowfast.prompts import Prompt
from tests.searcher.toys import METHODS, GaussianFlow, NearTarget
from tests.test_driver import assert_same, near

PROMPTS = ["a", "bb", Prompt("ccc", seed=5), "dddd", "eeeee"]


class Killed(Exception):
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


def test_two_groups_with_a_host_reward_go_on_too(tmp_path: Path) -> None:
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


def test_damage_and_seconds_are_named(tmp_path: Path) -> None:
    path = tmp_path / "search.safetensors"
    path.write_bytes(b"no safetensors")
    with pytest.raises(OptionError, match="cannot resume from .*search.safetensors.*remove it to start anew"):
        search(Counted(), path)
    with pytest.raises(OptionError, match="budget in seconds cannot be resumed"):
        search(Counted(), tmp_path / "other.safetensors", budget=None, seconds=1.0)
