"""What a host program may have set leaves the bits of searches and replays as they are, and is left as it was."""

import functools
import signal
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flowfast
from flowfast.errors import ModelError
from tests.toys import bits, no_grad  # noqa: F401

OPTIONS: dict[str, Any] = {"budget": 84, "steps": 6, "micro_batch": 4, "guidance": 2.0}
METHODS = {"svdd": {"choice": "softmax"}, "smc": {"tempering": "linear"}, "code": {}, "sop": {}, "rbf": {}}


def encode(prompts: list[str]) -> dict[str, Tensor]:
    rows = [[float(len(prompt))] for prompt in prompts]
    return {"size": torch.tensor(rows, dtype=torch.float32, device="cpu")}


@pytest.fixture(scope="module")
def weights() -> Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(3))


def model(weights: Tensor) -> Any:
    """A model with a product that autocast would take down to bfloat16."""

    def velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x @ weights + cond["size"] * t.view(-1, 1)

    return flowfast.flow_from(velocity, shape=(6,), encode=encode)


def reward(images: Tensor, prompts: list[str]) -> list[float]:
    return (-(images - 1).square().sum(1)).tolist()


def drawn(flow: Any, method: str, scorer: Any = reward) -> list[Tensor]:
    """The pictures and the replay of a search."""
    options = {"method": method, "method_options": METHODS[method], **OPTIONS}
    result = flowfast.search(flow, ["a", "bbb"], reward=scorer, **options)
    replayed = flowfast.replay(flow, result.samples[0], result.config)[-1][1]
    assert torch.equal(replayed, result.samples[0].image)
    return [sample.image for sample in result.samples]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": lambda: default_dtype(torch.float64),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float16": lambda: default_dtype(torch.float16),
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "enable_grad": torch.enable_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "deterministic": deterministic,
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("state", STATES)
def test_the_same_bits_in_any_state(state: str, method: str, weights: Tensor) -> None:
    wanted = drawn(model(weights), method)
    defaults = torch.get_default_dtype()
    with STATES[state]():
        inside = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
        found = drawn(model(weights), method)
        after = torch.get_default_dtype(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu")
    assert inside == after and torch.get_default_dtype() == defaults
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(bits(one), bits(other))


SCENE: dict[str, Any] = {"budget": 24, "steps": 5, "reward": "scenes*0.7+sharpness*0.3", "micro_batch": 4}


@pytest.fixture(scope="module")
def scene() -> flowfast.Sample:
    return flowfast.search(flowfast.load("scenes"), ["a red circle"], **SCENE).samples[0]


@pytest.mark.parametrize("state", STATES)
def test_the_embedded_model_and_its_rewards(state: str, scene: flowfast.Sample) -> None:
    """Loaded and run inside, too."""
    with STATES[state]():
        flow = flowfast.load("scenes")
        found = flowfast.search(flow, ["a red circle"], **SCENE).samples[0]
        steered = flowfast.search(flow, ["a red circle"], reward="scenes", gradient="dps:1", budget=24, steps=5)
    assert torch.equal(scene.image, found.image) and scene.reward == found.reward
    assert steered.samples[0].image.isfinite().all()


def test_weights_of_inference_mode_are_refused_only_where_a_gradient_is_asked_for(weights: Tensor) -> None:
    with torch.inference_mode():
        own = weights.clone()
    assert torch.equal(drawn(model(own), "rbf")[0], drawn(model(weights), "rbf")[0])
    with pytest.raises(ModelError, match="velocity raised RuntimeError: Inference tensors cannot be saved"):
        flowfast.search(model(own), ["a"], reward="sharpness", gradient="dps:1", **OPTIONS)


class Random(nn.Module):
    """Drops numbers in training mode."""

    def __init__(self, weights: Tensor):
        super().__init__()
        self.layer, self.drop = nn.Linear(6, 6, bias=False), nn.Dropout(0.5)
        self.layer.weight.data.copy_(weights)

    def velocity(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.drop(self.layer(x))

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.velocity(x, t, cond)


in_a_global = Random(torch.eye(6))


def global_velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return in_a_global.velocity(x, t, cond)


def through_another(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return global_velocity(x, t, cond)


@pytest.mark.parametrize("held", ["module", "method", "closure", "global", "helper", "partial", "reward"])
def test_modules_left_in_training_mode(held: str, weights: Tensor) -> None:
    """Evaluated as by a module in evaluation mode, and left as they were, one by one."""
    module = in_a_global if held in ("global", "helper") else Random(weights)
    velocity = {
        "module": module,
        "method": module.velocity,
        "closure": lambda x, t, cond: module.velocity(x, t, cond),
        "global": global_velocity,
        "helper": through_another,
        "partial": functools.partial(lambda own, x, t, cond: own.velocity(x, t, cond), module),
        "reward": lambda x, t, cond: x,
    }[held]

    def judge(images: Tensor, prompts: list[str]) -> Tensor:
        return module.velocity(images, images, {}).sum(1)

    flow = flowfast.flow_from(velocity, shape=(6,), encode=encode)
    scorer = judge if held == "reward" else reward
    module.eval()
    wanted = drawn(flow, "rbf", scorer)
    module.train()
    module.layer.eval()
    found = drawn(flow, "rbf", scorer)
    assert [part.training for part in (module, module.layer, module.drop)] == [True, False, True]
    for one, other in zip(wanted, found, strict=True):
        assert torch.equal(one, other)


def test_training_mode_is_back_after_an_error(weights: Tensor) -> None:
    module = Random(weights)
    flow = flowfast.flow_from(module, shape=(6,), encode=encode, decode=lambda x0: x0[:1])
    with pytest.raises(ModelError):
        flowfast.search(flow, ["a"], reward=reward, **OPTIONS)
    assert module.training and module.drop.training


def test_signal_handlers_threads_and_generators_are_left_alone(weights: Tensor) -> None:
    def handler(number: int, frame: Any) -> None:
        raise AssertionError("no signal was sent")

    before = signal.signal(signal.SIGINT, handler)
    try:
        torch.manual_seed(5)
        state, threads = torch.get_rng_state(), torch.get_num_threads()
        drawn(model(weights), "rbf")
        assert signal.getsignal(signal.SIGINT) is handler
        assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    finally:
        signal.signal(signal.SIGINT, before)
