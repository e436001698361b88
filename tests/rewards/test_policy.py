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
from flowfast.rewards import NAMES, CallableReward, available, load, on_host, score, weighted_sum

IMAGES = torch.rand(3, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a", "b", "c"]


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2, 3],
        (1.0, 2.0, 3.0),
        np.array([1, 2, 3]),
        np.array([1.0, 2.0, 3.0]),
        np.array([1, 2, 3], np.uint8),
        [np.float16(1), np.int64(2), 3],
        torch.tensor([1, 2, 3]).double(),
        torch.tensor([1.0, 2.0, 3.0]).bfloat16().requires_grad_(),
        [torch.tensor(1), torch.tensor(2.0), 3],
        [torch.tensor([value]).bfloat16().requires_grad_() for value in (1.0, 2.0, 3.0)],
    ],
    ids=[
        *("list", "tuple", "int array", "array", "bytes", "numpy's scalars", "float64 tensor", "bfloat16 with a graph"),
        *("tensors and a number", "tensors of one number"),
    ],
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
        (torch.zeros(3).to_sparse(), "a tensor of torch.float32, sparse"),
        ([1.0, True, 2.0], "got list of bool"),
        ([1.0, None, 2.0], "got list of object"),
        ({"scores": [1, 2, 3]}, "got dict of object"),
        ((score for score in (1, 2, 3)), "got generator of object"),
        (([1, 2, 3], "a note"), "got tuple of object"),
        ((torch.zeros(3), torch.zeros(3)), "got tuple of object|got .2, 3."),
        (np.zeros(3, complex), "got ndarray of complex128"),
        ([10**400, 1, 2], "got list of object"),
        (b"123", "got bytes"),
        ("123", "got str"),
    ],
)
def test_wrong_shape_or_type_says_expected_and_got(answer: Any, came: str) -> None:
    with pytest.raises(RewardError, match="reward 'taste'.*expected.*" + came.removeprefix(r"expected ")):
        CallableReward(lambda images, prompts: answer, name="taste")(IMAGES, PROMPTS)


@pytest.mark.filterwarnings("error")
def test_numbers_beyond_float32_are_infinite() -> None:
    answer = [1e300, -np.float64(1e300), float("inf")]
    assert CallableReward(lambda images, prompts: answer)(IMAGES, PROMPTS).tolist() == [np.inf, -np.inf, np.inf]


def test_one_that_leaves_the_program_is_one_that_raises() -> None:
    def leave(images: Tensor, prompts: list[str]) -> list[float]:
        raise SystemExit(3)

    for deadline in (None, 5):
        with pytest.raises(RewardError, match="reward 'leave' raised SystemExit: 3"):
            CallableReward(leave, deadline=deadline)(IMAGES, PROMPTS)


@pytest.mark.parametrize(
    ("shape", "calls"),
    [((200, 3, 2, 2), [64, 64, 64, 8]), ((5, 3, 2048, 2048), [2, 2, 1]), ((2, 3, 4096, 4096), [1, 1])],
)
def test_a_call_has_a_bounded_number_of_images(shape: tuple[int, ...], calls: list[int]) -> None:
    """In their order, each with its prompt and time, whatever the size of a round."""
    seen: list[int] = []

    def first(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(len(prompts))
        assert len(images) == len(prompts)
        return images[:, 0, 0, 0] + torch.tensor([float(prompt) for prompt in prompts])

    images = torch.arange(float(shape[0])).view(-1, 1, 1, 1).expand(shape)
    prompts = [str(1000 * i) for i in range(shape[0])]
    scores = CallableReward(first)(images, prompts, torch.zeros(shape[0]))
    assert seen == calls
    assert scores.tolist() == [1001 * i for i in range(shape[0])]
    seen.clear()
    doubled = weighted_sum([CallableReward(first)], [2.0])(images, prompts)
    assert doubled.tolist() == [2002 * i for i in range(shape[0])]
    assert seen == calls


def test_a_deadline_is_for_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowfast.rewards.host.MOST_IMAGES", 1)

    def slow(images: Tensor, prompts: list[str]) -> list[float]:
        time.sleep(0.1)
        return [0.0]

    assert CallableReward(slow, deadline=0.9)(torch.zeros(12, 3, 2, 2), ["a"] * 12).tolist() == [0] * 12


@pytest.mark.parametrize("own", [None, 5.0])
def test_the_deadline_of_a_sum_is_for_all_its_members(own: float | None) -> None:
    def slow(images: Tensor, prompts: list[str]) -> list[float]:
        time.sleep(1.1)
        return [0.0] * 3

    together = weighted_sum(
        [CallableReward(slow, "one", deadline=own), CallableReward(slow, "two")], [1, 1], deadline=1.6
    )
    before = time.perf_counter()
    with pytest.raises(RewardError, match="reward 'two' did not answer within"):
        together(IMAGES, PROMPTS)
    assert time.perf_counter() - before < 2.2


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
    for seconds in (0, -1, float("nan"), float("inf"), 1e300):
        refused = pytest.raises(RewardError, match="positive seconds, at most 1000000, got ")
        with refused:
            CallableReward(lambda images, prompts: [], deadline=seconds)
        with refused:
            load("http://host*0.5+sharpness", deadline=seconds)


def test_device_rewards_obey_the_same_policy() -> None:
    class Wrong(nn.Module):
        name = "wrong"

    images = torch.zeros(4, 3, 2, 2)
    with pytest.raises(RewardError, match=r"reward 'wrong': expected shape \(4,\)"):
        score(Wrong(), lambda: torch.zeros(5), images)
    with pytest.raises(RewardError, match="reward 'wrong' raised RuntimeError"):
        score(Wrong(), lambda: torch.zeros(2) + torch.zeros(3), images)
    assert score(Wrong(), lambda: torch.zeros(4).double(), images).dtype is torch.float32


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
