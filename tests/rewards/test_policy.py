"""testing.md F1: a reward that raises, hangs, returns NaN or the wrong shape."""

from __future__ import annotations

import threading
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowfast.errors import FlowfastError, OptionError, PromptError, RewardError
from flowfast.rewards import NAMES, CallableReward, available, load, on_host, score

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "answer",
    [[1, 2, 3], (1.0, 2.0, 3.0), np.array([1, 2, 3]), np.array([1.0, 2.0, 3.0]), torch.tensor([1, 2, 3]).double()],
    ids=["list", "tuple", "int array", "array", "float64 tensor"],
)
def test_a_host_reward_may_answer_in_any_of_these(answer: Any) -> None:
    scores = CallableReward(lambda images, prompts: answer)(IMAGES, PROMPTS)
    assert scores.dtype is torch.float32
    assert scores.tolist() == [1, 2, 3]


def test_it_sees_cpu_float_images_and_a_list_of_prompts() -> None:
    seen: list[Any] = []

    def look(images: Tensor, prompts: list[str]) -> list[float]:
        seen.extend([images.dtype, images.requires_grad, prompts])
        return [0.0] * 3

    CallableReward(look)(IMAGES.bfloat16().requires_grad_(), tuple(PROMPTS))
    assert seen == [torch.float32, False, PROMPTS]


def test_one_that_raises_is_named_and_is_the_cause() -> None:
    def broken(images: Tensor, prompts: list[str]) -> list[float]:
        raise KeyError("no such weight")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError: 'no such weight'") as caught:
        CallableReward(broken)(IMAGES, PROMPTS)
    assert isinstance(caught.value.__cause__, KeyError)
    assert isinstance(caught.value, FlowfastError)


def test_errors_of_flowfast_pass_through() -> None:
    def refuse(images: Tensor, prompts: list[str]) -> list[float]:
        raise PromptError("no such kind")

    with pytest.raises(PromptError, match="no such kind"):
        CallableReward(refuse)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("answer", "came"),
    [
        ([1.0, 2.0], r"expected shape \(3,\).*got \(2,\)"),
        (torch.zeros(3, 1), r"got \(3, 1\)"),
        (1.0, r"got \(\)"),
        (None, "got NoneType"),
        (["x", "y", "z"], "got list of <U1"),
        ([[1.0], [1.0, 2.0], []], "got list of object"),
        ([True, False, True], "of bool"),
        (torch.zeros(3, dtype=torch.bool), "torch.bool"),
        (torch.zeros(3, dtype=torch.complex64), "torch.complex64"),
    ],
)
def test_wrong_shape_or_type_says_expected_and_got(answer: Any, came: str) -> None:
    with pytest.raises(RewardError, match="reward 'taste'.*expected.*" + came.removeprefix(r"expected ")):
        CallableReward(lambda images, prompts: answer, name="taste")(IMAGES, PROMPTS)


def test_nan_stays_for_the_search_to_count() -> None:
    scores = CallableReward(lambda images, prompts: [0.5, float("nan"), -1.0])(IMAGES, PROMPTS)
    assert torch.isnan(scores).tolist() == [False, True, False]


def test_one_that_hangs_is_left_behind() -> None:
    release = threading.Event()

    def hang(images: Tensor, prompts: list[str]) -> list[float]:
        release.wait(30)
        return [0.0] * 3

    before = time.perf_counter()
    with pytest.raises(RewardError, match="reward 'hang' did not answer within 0.05 s"):
        CallableReward(hang, deadline=0.05)(IMAGES, PROMPTS)
    release.set()
    assert time.perf_counter() - before < 5


def test_a_deadline_changes_nothing_else() -> None:
    def broken(images: Tensor, prompts: list[str]) -> list[float]:
        raise OSError("connection lost")

    with pytest.raises(RewardError, match="OSError: connection lost"):
        CallableReward(broken, deadline=5)(IMAGES, PROMPTS)
    with torch.no_grad():
        reward = CallableReward(lambda images, prompts: [float(torch.is_grad_enabled())] * 3, deadline=5)
        assert reward(IMAGES, PROMPTS).tolist() == [0, 0, 0]


def test_a_deadline_that_cannot_be() -> None:
    with pytest.raises(RewardError, match="positive seconds, got 0"):
        CallableReward(lambda images, prompts: [], deadline=0)


def test_device_rewards_obey_the_same_policy() -> None:
    class Wrong(nn.Module):
        name = "wrong"

    with pytest.raises(RewardError, match=r"reward 'wrong': expected shape \(4,\)"):
        score(Wrong(), lambda: torch.zeros(5), 4)
    with pytest.raises(RewardError, match="reward 'wrong' raised RuntimeError"):
        score(Wrong(), lambda: torch.zeros(2) + torch.zeros(3), 4)
    assert score(Wrong(), lambda: torch.zeros(4).double(), 4).dtype is torch.float32


def test_load() -> None:
    assert set(available()) == set(NAMES) > {"scenes", "sharpness"}
    assert all(line and "\n" not in line for line in available().values())
    assert not on_host(load("sharpness"))
    assert on_host(load(len))
    assert load(len, deadline=2).deadline == 2
    ready = CallableReward(len)
    assert load(ready) is ready


@pytest.mark.parametrize(
    ("what", "error", "says"),
    [
        ("beauty", OptionError, "unknown reward 'beauty': choose one of scenes, sharpness"),
        ("sharpness*x", OptionError, "expected a weight after"),
        ("sharpness+", OptionError, "unknown reward ''"),
        (3, RewardError, "got int"),
        (nn.Identity(), RewardError, r"no encode\(prompts\)"),
    ],
)
def test_load_refuses(what: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        load(what)
