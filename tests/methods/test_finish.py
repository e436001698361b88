"""The result is a finished sample (docs/design.md): its last evaluation stands at linear t <= t_finish, near the end of
its trajectory."""

import math

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.flow import parse_interpolant
from tests.problems import two_dimensions
from tests.toys import METHODS as ALL
from tests.toys import PROMPTS, NearTarget

METHODS = [method for method in ALL if method != "rbf-official"]  # it alone may hand out what the public code does

MIXTURE, LINEAR = two_dimensions(), parse_interpolant("linear")


def velocity(x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    return MIXTURE.velocity(x_t.double(), t.double(), LINEAR).float()


def flow(t_finish: float = 0.1) -> flowfast.types.Flow:
    return flowfast.flow_from(velocity, shape=(2,), t_finish=t_finish)


def ode_end(x: Tensor, t: float, steps: int = 50) -> Tensor:
    """Euler steps down to t = 0; the velocity at t = 0 is never asked for."""
    x = x.double()
    for k in range(steps):
        now = t * (1 - k / steps)
        x = x - t / steps * MIXTURE.velocity(x[None], torch.tensor([now], dtype=torch.float64), LINEAR)[0]
    return x


@pytest.mark.parametrize("interpolant", ["linear", "vp"])
@pytest.mark.parametrize("steps", [6, 10])
@pytest.mark.parametrize("method", METHODS)
def test_the_result_is_where_a_50_step_ode_ends_from_the_same_point(method, steps, interpolant):
    finished: dict[int, set[float]] = {}

    def collect(found) -> None:
        for c in found:
            finished.setdefault(c.prompt, set()).update([c.t] if c.finished else [])

    result = flowfast.search(
        flow(),
        PROMPTS,
        reward=NearTarget(),
        method=method,
        budget=100,
        steps=steps,
        interpolant=interpolant,
        on_round=collect,
    )
    times = flowfast.replay(flow(), result.samples[0], result.config)
    assert times[-1][0] <= 0.1 + 1e-6
    for k, sample in enumerate(result.samples):
        assert finished[k] and max(finished[k]) <= 0.1 + 1e-6
        t = flowfast.replay(flow(), sample, result.config)[-1][0]
        assert t <= 0.1 + 1e-6
        end = ode_end(sample.top[0].x_t, t)
        assert float((sample.latent - end).norm()) < 0.08  # the components are 0.2-0.4 wide and 1.4 apart


def test_a_sample_handed_out_early_is_far_from_its_end():
    """The mutant: an unfinished posterior mean, as one at linear t = 0.7, is another thing."""
    result = flowfast.search(
        flow(0.7), PROMPTS, reward=NearTarget(), method="bon", budget=40, grid="linear-times:1,.85,.7"
    )
    gaps = [float((s.latent - ode_end(s.top[0].x_t, 0.7)).norm()) for s in result.samples]
    assert max(gaps) > 0.2


@pytest.mark.parametrize("method", METHODS)
def test_a_few_step_model_finishes_where_it_says(method):
    """t_finish of a distilled model is its own last sigma; then no tail is needed and none is paid for."""
    result = flowfast.search(flow(0.25), ["a"], reward=NearTarget(), method=method, budget=60, steps=4)
    transitions = len(result.samples[0].winner.path)
    assert transitions == 4 or method == "sop"
    assert math.isclose(flowfast.replay(flow(0.25), result.samples[0], result.config)[-1][0], 0.25, abs_tol=1e-6)


def test_the_public_codes_ending_is_only_for_rbf_official():
    """Without a tail the paper's grid ends at linear t = 0.71: only `rbf-official` hands such a sample out."""
    options = {"reward": NearTarget(), "budget": 100, "preset": "paper", "tail": 0}
    result = flowfast.search(flow(), ["a"], method="rbf-official", **options)
    assert 0.65 < flowfast.replay(flow(), result.samples[0], result.config)[-1][0] < 0.75
    with pytest.raises(flowfast.errors.FlowfastError):
        flowfast.search(flow(), ["a"], method="rbf", **options)
