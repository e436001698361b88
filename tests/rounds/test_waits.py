"""The host waits for nothing inside a round (testing.md S): counted on the fake device, eager and scripted."""

from collections.abc import Callable

import pytest
import torch
from fake_device import DEVICE, DeviceTensor, FakeDevice, unwrap
from torch import Tensor, nn

import flowfast
from flowfast.methods.base import Chains
from tests.on_device import FlowOnDevice, RewardOnDevice
from tests.toys import METHODS, Bench, GaussianFlow, NearTarget, build, on, same

MOST_LAUNCHES = 160
"""A round's launches, the toy model's and reward's included; a guard against creep, not a goal."""
OURS = {"assign_lanes", "branch_step", "posterior_mean", "decide", "normal_", "uniform_"}


def rounds_on(device: FakeDevice, method: str, **options) -> tuple[Bench, int]:
    """Two slots from admission to their end; `device` then holds the counts of all rounds and of nothing else."""
    bench = build(method, device=DEVICE, **options)
    bench.admit(0, "a")
    bench.admit(1, "bb")
    device.clear()
    return bench, bench.run()


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("method", METHODS)
def test_no_round_of_any_method_waits(method, scripted):
    with FakeDevice() as device:
        _, rounds = rounds_on(device, method, scripted=scripted)
    assert rounds >= 7
    assert not device.waits
    assert not device.copies
    assert sum(device.launches.values()) / rounds < MOST_LAUNCHES


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("method", ["bon", "svdd", "rbf"])
def test_a_round_is_three_launches_beside_model_and_reward(method, scripted):
    """And one gather for each condition of model and reward; the first round has to lay its lanes itself. Latents are
    the pictures here: others are summed, one launch a micro-batch."""
    flow, reward = GaussianFlow(), NearTarget()
    with FakeDevice() as device:
        _, rounds = rounds_on(device, method, scripted=scripted, flow=flow, reward=reward, score_all=True)
        ours = {name: count for name, count in device.launches.items() if name in OURS}
        whole = sum(device.launches.values())
        device.clear()
        x, t = torch.zeros(16, 3, device=DEVICE), torch.full((16,), 0.5, device=DEVICE)
        cond, target = on(flow.encode(["a"] * 16), DEVICE), on(reward.encode(["a"] * 16), DEVICE)
        device.clear()
        reward(flow.decode(flow.velocity(x, t, cond)), t, target)
        theirs = sum(device.launches.values())
    assert ours == {"assign_lanes": 1, "branch_step": rounds, "posterior_mean": rounds, "decide": rounds}
    if not scripted:  # TorchScript writes the toys' own arithmetic in other ops
        assert whole == 1 + rounds * (3 + theirs + 2)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_one_prompt_alone_has_nothing_to_gather(scripted):
    """Its conditions lie there once a row: a round is three launches, and what model and reward make of theirs."""
    with FakeDevice() as device:
        bench = build("rbf", device=DEVICE, slots=1, scripted=scripted)
        bench.admit(0, "a")
        device.clear()
        rounds = bench.run()
    assert device.launches["index_select"] == 0
    assert sum(device.launches[name] for name in OURS) == 3 * rounds + 1


@pytest.mark.parametrize(
    "options",
    [
        {"guidance": 3.0, "budget": 80},
        {"top": 3},
        {"micro_batch": 4, "lanes": 3},
        {"budget": 60, "micro_batch": 7},
    ],
    ids=lambda options: ",".join(options),
)
@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_no_round_waits_whatever_the_options(options, scripted):
    for method in ("rbf", "smc"):
        with FakeDevice() as device:
            rounds_on(device, method, scripted=scripted, **options)
        assert not device.waits
        assert not device.copies


@pytest.mark.parametrize(
    ("method", "method_options"),
    [
        ("smc", {"resampling": "multinomial"}),
        ("smc", {"resampling": "ssp"}),
        ("smc", {"tempering": "linear"}),
        ("svdd", {"choice": "softmax"}),
    ],
    ids=str,
)
def test_no_round_waits_whatever_the_method_options(method, method_options):
    with FakeDevice() as device:
        rounds_on(device, method, method_options=method_options)
    assert not device.waits


@pytest.mark.parametrize("method", ["svdd", "smc"])
def test_the_pytorch_reference_of_the_ops_does_not_wait_either(method):
    """A device without kernels of its own runs the reference op by op."""
    with FakeDevice(fused=False) as device:
        rounds_on(device, method)
    assert not device.waits


def test_the_engine_waits_for_admissions_and_results_only():
    """Twice the rounds, as many waits."""
    waits, rounds = [], []
    for budget in (40, 80):
        with FakeDevice() as device:
            flow, reward = FlowOnDevice().to(DEVICE), RewardOnDevice().to(DEVICE)
            result = flowfast.search(flow, ["a", "bb"], reward=reward, method="rbf", budget=budget, steps=6)
        waits.append(sum(device.waits.values()))
        rounds.append(result.rounds)
    assert rounds == [20, 40]
    assert waits[0] == waits[1]


@pytest.mark.parametrize("method", METHODS)
def test_the_fake_device_computes_what_the_cpu_does(method):
    with FakeDevice() as device:
        bench, _ = rounds_on(device, method)
        found = {name: unwrap(value) for name, value in bench.engine.release(1).items()}
    plain = build(method)
    plain.admit(0, "a")
    plain.admit(1, "bb")
    plain.run()
    assert same(found, plain.engine.release(1)) == []


# ---- mutants: each of these must be seen ---------------------------------------------------------------------


class Item(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return images.flatten(1).sum(1) / images.abs().max().item()


class Truth(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        if bool(images.isnan().any()):
            images = images.nan_to_num()
        return images.flatten(1).sum(1)


class Mask(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return images.flatten(1).sum(1) - images[images > 0].sum()


class NonZero(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return images.flatten(1).sum(1) * torch.nonzero(t).size(0)


class ToHost(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return images.cpu().flatten(1).sum(1).to(images.device)


class FromList(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return (images.flatten(1) * torch.tensor([0.5, 1.0, 2.0], device=images.device)).sum(1)


class RepeatByTensor(NearTarget):
    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        once = torch.ones(images.size(0), dtype=torch.int64, device=images.device)
        return images.flatten(1).sum(1).repeat_interleave(once)


MUTANTS = [Item, Truth, Mask, NonZero, ToHost, FromList, RepeatByTensor]


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_a_reward_that_waits_is_seen_in_every_round(mutant: Callable[[], nn.Module], scripted):
    with FakeDevice() as device:
        _, rounds = rounds_on(device, "svdd", reward=mutant(), scripted=scripted, score_all=True)
    assert sum(device.waits.values()) >= rounds


class WaitingMethod(Chains):
    def __init__(self) -> None:
        super().__init__(regroups=True)

    @torch.jit.export
    def regroup(self, rewards: Tensor, transition: Tensor, moved: Tensor, key: Tensor) -> Tensor:
        if int(moved.sum()) > 0:
            rewards = rewards + 1
        return torch.arange(rewards.size(1), device=rewards.device).expand_as(rewards)


@pytest.mark.parametrize("scripted", [False, True], ids=["eager", "scripted"])
def test_a_method_that_waits_is_seen_in_every_round(scripted):
    with FakeDevice() as device:
        _, rounds = rounds_on(device, "bon", module=lambda plan, slots: WaitingMethod(), scripted=scripted)
    assert sum(device.waits.values()) == rounds


def test_asynchronous_copies_are_counted_apart():
    with FakeDevice() as device:
        rewards = torch.ones(4, device=DEVICE)
        host = rewards.to("cpu", non_blocking=True)
        torch.empty(4).copy_(rewards, non_blocking=True)
        assert not device.waits and sum(device.copies.values()) == 2
        torch.empty(4).copy_(rewards)
        rewards.cpu()
    assert not isinstance(host, DeviceTensor)
    assert sum(device.waits.values()) == 2


def test_views_and_allocations_are_no_launches():
    with FakeDevice() as device:
        x = torch.empty(4, 4, device=DEVICE)
        x.view(16)[3:].unsqueeze(0).narrow(1, 0, 2)
        assert not device.launches
        x.add_(1)
        x[:, 1].zero_()
        assert sum(device.launches.values()) == 2
        assert x.cpu()[:, 1].tolist() == [0.0] * 4
