"""A call of `search`: host rewards overlap the device without changing results, records lag without losing anything,
requests wait once. What a device would do late is played by letters that arrive late."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
from fake_device import DEVICE, FakeDevice
from torch import Tensor

import flowfast
from flowfast.engine import outputs, transfer
from flowfast.errors import RewardError
from flowfast.models import compiled as compiling
from flowfast.types import Candidate
from tests.on_device import FlowOnDevice, RewardOnDevice
from tests.toys import METHODS, GaussianFlow, NearTarget

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def near(images: Tensor, prompts: list[str]) -> Tensor:
    """The reward of `NearTarget`, on the host."""
    target = torch.tensor([[1.0 + len(prompt) % 3] for prompt in prompts])
    return -(images.flatten(1) - target).square().sum(1)


def search(reward: Any = near, **options: Any) -> flowfast.SearchResult:
    options = {"method": "rbf", "budget": 40, "steps": 6, "slots": 4, "micro_batch": 4, **options}
    return flowfast.search(options.pop("flow", GaussianFlow()), PROMPTS, reward=reward, **options)


def assert_same(one: flowfast.SearchResult, other: flowfast.SearchResult) -> None:
    for left, right in zip(one.samples, other.samples, strict=True):
        assert (left.winner, left.nfe, left.reward) == (right.winner, right.nfe, right.reward)
        assert torch.equal(left.latent, right.latent) and torch.equal(left.image, right.image)


# ---- two batches in turns ----


@pytest.mark.parametrize("method", METHODS)
def test_two_batches_give_the_results_of_one(method: str) -> None:
    assert_same(search(method=method, overlap=True), search(method=method, overlap=False))


@pytest.mark.parametrize("overlap", [True, False])
def test_the_device_runs_one_batch_while_the_host_scores_the_other(overlap: bool) -> None:
    """Both take 10 ms, whatever the load: then spans of time either overlap or cannot."""
    spans: dict[str, list[tuple[float, float]]] = {"flow": [], "reward": []}

    def spend(whose: str) -> None:
        start = time.perf_counter()
        time.sleep(0.01)
        spans[whose].append((start, time.perf_counter()))

    class SlowFlow(GaussianFlow):
        def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            spend("flow")
            return super().velocity(x_t, t, cond)

    def slow(images: Tensor, prompts: list[str]) -> Tensor:
        spend("reward")
        return near(images, prompts)

    result = search(slow, flow=SlowFlow(), overlap=overlap)
    met = sum(any(a < d and c < b for c, d in spans["flow"]) for a, b in spans["reward"])
    assert met > result.rounds / 2 if overlap else met == 0


def test_an_error_of_the_reward_comes_out_of_the_other_thread() -> None:
    def broken(images: Tensor, prompts: list[str]) -> Tensor:
        raise ValueError("no such file")

    with pytest.raises(RewardError, match="broken.*no such file"):
        search(broken)


def test_one_slot_needs_no_second_batch() -> None:
    names = set()

    def score(images: Tensor, prompts: list[str]) -> Tensor:
        names.add(threading.current_thread().name)
        return near(images, prompts)

    search(score, slots=1)
    assert names == {threading.main_thread().name}


# ---- letters ----


class Late:
    """An event that has passed only when somebody waits for it."""

    waited = 0

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        Late.waited += 1


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every transfer comes as late as it may."""
    Late.waited = 0
    plain = transfer.Transfers.send

    def send(self: transfer.Transfers, tensors: list[Tensor]) -> transfer.Transfer:
        sent_off = plain(self, tensors)
        return sent_off if self.device.type == "cpu" else sent_off._replace(event=Late())

    monkeypatch.setattr(transfer.Transfers, "send", send)


def records(device: bool, **options: Any) -> tuple[list[Any], flowfast.SearchResult]:
    """What `on_round` and `on_sample` were told, in order."""
    told: list[Any] = []
    options = {"method": "rbf", "budget": 30, "steps": 6, "slots": 2, "micro_batch": 4, **options}
    flow, reward = (FlowOnDevice(), RewardOnDevice()) if device else (GaussianFlow(), NearTarget())
    result = flowfast.search(
        flow.to(DEVICE) if device else flow,
        PROMPTS,
        reward=reward.to(DEVICE) if device else reward,
        on_round=lambda found: told.extend(found),
        on_sample=lambda index, sample: told.append(index),
        **options,
    )
    return told, result


@pytest.mark.parametrize("method", ["rbf", "smc"])
def test_late_records_are_complete_in_order_and_before_their_sample(late: None, method: str) -> None:
    with FakeDevice():
        told, found = records(True, method=method)
    expected, plain = records(False, method=method)
    assert_same(found, plain)
    for prompt in range(len(PROMPTS)):
        of_prompt = [[one for one in some if belongs(one, prompt)] for some in (told, expected)]
        assert of_prompt[0] == of_prompt[1]
        assert of_prompt[0][-1] == prompt  # the sample comes last


def belongs(told: Any, prompt: int) -> bool:
    return (told.prompt if isinstance(told, Candidate) else told) == prompt


def test_records_that_are_overwritten_too_early_would_show(late: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outputs, "LAG", 6)  # the mutant: as many letters are read late, but the ring is not longer
    init = transfer.Transfers.__init__
    monkeypatch.setattr(transfer.Transfers, "__init__", lambda self, device, depth: init(self, device, 3))
    with FakeDevice():
        told, _ = records(True)
    assert sorted(map(str, told)) != sorted(map(str, records(False)[0]))


@pytest.mark.parametrize("reward", ["device", "host"])
def test_a_request_waits_once_and_a_round_never(reward: str) -> None:
    """Blocking copies and reads are the same however many rounds and requests there are; a request's result is one
    asynchronous copy (which the host then waits for), a round's host rewards are one each way, and the plan that all of
    them have goes over in three."""
    waits, copies, rounds = [], [], []
    for prompts, budget in ((2, 40), (2, 80), (4, 40)):
        with FakeDevice() as device:
            result = flowfast.search(
                FlowOnDevice().to(DEVICE), PROMPTS[:prompts],
                reward=near if reward == "host" else RewardOnDevice().to(DEVICE),
                method="rbf", budget=budget, steps=6, slots=2, micro_batch=4, overlap=False,
            )  # fmt: skip
        waits.append(sum(device.waits.values()))
        copies.append(sum(device.copies.values()))
        rounds.append(result.rounds)
    assert waits[0] == waits[1] == waits[2]
    a_round = 2 if reward == "host" else 0
    assert copies == [3 + count * a_round + prompts for count, prompts in zip(rounds, (2, 2, 4), strict=True)]


def test_until_and_progress_do_not_wait_either() -> None:
    waits = []
    for budget in (40, 80):
        with FakeDevice() as device:
            flowfast.search(
                FlowOnDevice().to(DEVICE), PROMPTS[:2], reward=RewardOnDevice().to(DEVICE), method="rbf",
                budget=budget, steps=6, slots=2, until=1e9, on_progress=lambda spent, whole: None,
            )  # fmt: skip
        waits.append(sum(device.waits.values()))
    assert waits[0] == waits[1]


def test_until_ends_a_request_early_on_a_device(late: None) -> None:
    found = []
    for until in (None, -1e9):
        with FakeDevice():
            result = flowfast.search(
                FlowOnDevice().to(DEVICE), PROMPTS[:2], reward=RewardOnDevice().to(DEVICE), method="rbf",
                budget=200, steps=10, lanes=1, slots=2, until=until,
            )  # fmt: skip
        found.append((result.rounds, sum(sample.nfe for sample in result.samples)))
    (rounds, nfe), (early_rounds, early_nfe) = found
    assert early_rounds < rounds and early_nfe < nfe


def test_letters_keep_dtypes_shapes_and_bits() -> None:
    tensors = [
        torch.tensor([True, False, True]),
        torch.arange(5, dtype=torch.int64),
        torch.randn(3, 2, 7),
        torch.randn(5).bfloat16(),
        torch.zeros(0, 4),
    ]
    with FakeDevice() as device:
        box = transfer.Transfers(DEVICE, 2)
        inside = [tensor.to(DEVICE) for tensor in tensors]
        device.clear()
        first = box.send(inside)
        inside[1].add_(1)
        second = box.send(inside)
        assert sum(device.copies.values()) == 2 and not device.waits
    for sent_off, shift in ((first, 0), (second, 1)):
        for read, sent in zip(sent_off.read(), tensors, strict=True):
            assert read.dtype == sent.dtype and torch.equal(read, sent + shift if sent.dtype == torch.int64 else sent)


# ---- torch.compile ----


def test_compile_is_asked_once_for_velocity_and_decoder(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fake(function: Any, dynamic: bool) -> Any:
        asked.append((function.__name__, dynamic))
        return function

    monkeypatch.setattr(torch, "compile", fake)
    compiling.compiled.cache_clear()
    flow = GaussianFlow()
    found = [search(flow=flow, compile=True) for _ in range(2)]
    assert asked == [("velocity", False), ("decode", False)]
    assert found[0].config.compile
    assert_same(found[0], search(flow=flow))
