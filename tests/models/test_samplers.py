"""The sampler of a pipeline as it stands: its live times, and by its name where it walks no flow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flowfast.errors import ModelError, OptionError
from flowfast.models.diffusers import from_diffusers
from flowfast.models.diffusers.samplers import own_sampler, sampler_facts, sampler_from, sampler_times
from flowfast.models.diffusers.scheduler import FlowSDEScheduler, FlowSearchScheduler
from tests.models.tiny.sd3 import sd3

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 2.0}


def made(name: str, **config: Any) -> Any:
    import diffusers

    return getattr(diffusers, name)(**config)


def shifted(shift: float, times: list[float]) -> list[float]:
    return [shift * t / (1 + (shift - 1) * t) for t in times]


def test_a_shift_set_by_hand_moves_the_times() -> None:
    """The shift is on the scheduler, not in its config; the lowest time is that of the shift it was made with."""
    scheduler = made("FlowMatchEulerDiscreteScheduler", shift=2.0)
    low = shifted(2.0, [0.001])[0]
    scheduler.set_shift(6.0)
    expected = torch.tensor(shifted(6.0, torch.linspace(1, low, 5).tolist()))
    scheduler.set_timesteps(5)
    torch.testing.assert_close(scheduler.sigmas[:-1], expected)
    torch.testing.assert_close(torch.tensor(sampler_times(own_sampler(scheduler), num_inference_steps=5)), expected)
    ours = FlowSDEScheduler.from_config(scheduler)
    ours.set_timesteps(5)
    torch.testing.assert_close(ours.sigmas[:-1], expected)


def test_a_shift_set_by_hand_reaches_every_door(tmp_path: Any) -> None:
    def times(scheduler: Any) -> Tensor:
        scheduler.set_timesteps(4)
        return scheduler.sigmas[:-1]

    pipe = sd3()
    pipe.scheduler.set_shift(9.0)
    expected = torch.tensor([1.0, 0.9476, 0.8195, 0.0263])
    torch.testing.assert_close(times(FlowSDEScheduler.from_config(pipe.scheduler)), expected, atol=1e-4, rtol=0)
    own = from_diffusers(pipe, height=16, width=16, max_sequence_length=48).own_times(4)
    torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=0)
    # On ours as on the pipeline's own; saved and loaded; from one of ours to the next; below ours, for from_diffusers.
    ours = FlowSearchScheduler.from_config(sd3().scheduler, reward=lambda images, prompts: images)
    ours.set_shift(9.0)
    torch.testing.assert_close(times(ours), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(times(FlowSDEScheduler.from_config(ours)), expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(times(FlowSDEScheduler.from_config(ours.config)), expected, atol=1e-4, rtol=0)
    ours.save_pretrained(tmp_path)
    torch.testing.assert_close(times(FlowSDEScheduler.from_pretrained(tmp_path)), expected, atol=1e-4, rtol=0)
    pipe.scheduler = FlowSearchScheduler.from_config(pipe.scheduler)  # without a reward
    own = from_diffusers(pipe, height=16, width=16, max_sequence_length=48).own_times(4)
    torch.testing.assert_close(torch.tensor(own), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FlowMatchHeunDiscreteScheduler", {"shift": 2.5}),
        ("FlowMatchLCMScheduler", {"shift": 2.5}),
        ("UniPCMultistepScheduler", FLOW),
        ("DPMSolverMultistepScheduler", FLOW),
        ("DEISMultistepScheduler", FLOW),
    ],
)
def test_other_samplers_give_their_own_times_once_each(name: str, config: dict[str, Any]) -> None:
    scheduler = made(name, **config)
    scheduler.set_timesteps(5)
    expected = torch.unique(scheduler.sigmas[:-1].float()).flip(0)
    assert len(expected) == 5
    ours = FlowSDEScheduler.from_config(scheduler)
    ours.set_timesteps(5)
    assert len(ours.timesteps) == 5
    torch.testing.assert_close(ours.sigmas[:-1], expected)
    # Its config does not name its class: taken for Euler's it would give other times.
    with pytest.raises(ModelError, match=f"fields of .*{name}.*give the scheduler itself"):
        FlowSDEScheduler.from_config(scheduler.config)
    # A file does.
    torch.testing.assert_close(
        torch.tensor(sampler_times(sampler_from({"_class_name": name, **scheduler.config}), num_inference_steps=5)),
        expected,
    )


def test_a_heun_scheduler_in_a_pipeline_evaluates_each_time_once() -> None:
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe = sd3()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    own = from_diffusers(pipe, height=16, width=16, max_sequence_length=48).own_times(6)
    assert len(own) == 6 == len(set(own))
    pipe.scheduler = FlowSDEScheduler.from_config(pipe.scheduler, diffusion="zero")
    pipe.set_progress_bar_config(disable=True)
    asked: list[float] = []
    pipe.transformer.register_forward_pre_hook(
        lambda module, args, given: asked.append(float(given["timestep"][0])), with_kwargs=True
    )
    pipe("a cat", num_inference_steps=6, height=16, width=16, max_sequence_length=48, output_type="latent")
    torch.testing.assert_close(torch.tensor(asked), 1000 * torch.tensor(own))


REFUSED = {
    "DDIMScheduler": ({}, "it predicts epsilon"),
    "EulerDiscreteScheduler": ({}, "it predicts epsilon"),
    "PNDMScheduler": ({"prediction_type": "v_prediction"}, "it predicts v_prediction"),
    "SCMScheduler": ({}, "it predicts trigflow"),
    "EDMEulerScheduler": ({}, "it predicts epsilon"),
    "DDPMScheduler": ({"prediction_type": "sample"}, "it predicts sample"),
    "UniPCMultistepScheduler": ({"prediction_type": "flow_prediction"}, "use_flow_sigmas is not set"),
    "FlowMapEulerDiscreteScheduler": ({"shift": 3.0}, "mean velocities between two times"),
    "MiniMaxH3Scheduler": ({}, "its timesteps rise"),
    "FlowMatchEulerDiscreteScheduler": ({"invert_sigmas": True}, "invert_sigmas lets its times rise"),
    "FlowMatchLCMScheduler": ({"scale_factors": [0.5, 1.0]}, "scale_factors enlarge"),
}


def test_a_scale_set_by_hand_is_refused_too() -> None:
    scheduler = made("FlowMatchLCMScheduler")
    own_sampler(scheduler)
    scheduler.set_scale_factors([0.5, 1.0], "bicubic")
    with pytest.raises(ModelError, match="FlowMatchLCMScheduler: scale_factors enlarge"):
        own_sampler(scheduler)


@pytest.mark.parametrize("name", REFUSED)
def test_what_walks_no_flow_is_refused_by_its_name(name: str) -> None:
    config, why = REFUSED[name]
    scheduler = made(name, **config)
    with pytest.raises(ModelError, match=f"got {name}: .*{why}"):
        own_sampler(scheduler)
    with pytest.raises(ModelError, match=f"got {name}: .*{why}"):
        FlowSDEScheduler.from_config(scheduler)
    with pytest.raises(ModelError, match=name):  # as a config alone, which is complete
        FlowSDEScheduler.from_config(scheduler.config)
    pipe = sd3()
    pipe.scheduler = scheduler
    with pytest.raises(ModelError, match=name):
        from_diffusers(pipe, height=16, width=16, max_sequence_length=48)


@pytest.mark.parametrize(
    ("config", "arguments", "error", "message"),
    [
        ({}, {"num_inference_steps": 0}, OptionError, "at least 1, a whole number, got 0"),
        ({}, {"num_inference_steps": -3}, OptionError, "at least 1, a whole number, got -3"),
        ({}, {"num_inference_steps": 2.5}, OptionError, "at least 1, a whole number, got 2.5"),
        ({}, {"num_inference_steps": None}, OptionError, "at least 1, a whole number, got None"),
        ({}, {"sigmas": []}, OptionError, "at least 1, a whole number, got 0"),
        ({}, {"sigmas": [0.9, 0.5], "num_inference_steps": 3}, OptionError, "same length"),
        ({}, {"sigmas": [0.2, 0.9]}, ModelError, "falling from at most 1, got 0.2, 0.9"),
        ({}, {"sigmas": [14.6, 7.0]}, ModelError, "falling from at most 1, got 14.6, 7"),
        ({}, {"sigmas": [math.nan, 0.5]}, ModelError, "falling from at most 1, got nan, 0.5"),
        ({"use_dynamic_shifting": True}, {"num_inference_steps": 3}, OptionError, "`mu` must be passed"),
    ],
    ids=str,
)
def test_times_that_cannot_be_are_refused_by_the_samplers_name(
    config: dict[str, Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    scheduler = made("FlowMatchEulerDiscreteScheduler", **config)
    with pytest.raises(error, match=f"FlowMatchEulerDiscreteScheduler.*{message}"):
        FlowSDEScheduler.from_config(scheduler).set_timesteps(**arguments)


def test_an_argument_that_a_sampler_does_not_take() -> None:
    """A pipeline that gives its own sigmas, such as FLUX, with a sampler that has none but its own."""
    with pytest.raises(OptionError, match="FlowMatchHeunDiscreteScheduler takes no sigmas"):
        FlowSDEScheduler.from_config(made("FlowMatchHeunDiscreteScheduler")).set_timesteps(sigmas=[1.0, 0.5])
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    with pytest.raises(OptionError, match="mu asks for use_dynamic_shifting=True in its config"):
        FlowSDEScheduler.from_config(made("DPMSolverMultistepScheduler", **flow)).set_timesteps(4, mu=0.7)


def test_configs_that_do_not_name_their_class() -> None:
    euler = made("FlowMatchEulerDiscreteScheduler", shift=4.0)
    expected = sampler_times(own_sampler(euler), num_inference_steps=3)
    for config in (euler.config, dict(euler.config), {"shift": 4.0}, {"_class_name": type(euler).__name__, "shift": 4}):
        assert sampler_times(sampler_from(sampler_facts(config)), num_inference_steps=3) == expected
    assert sampler_times(FlowSDEScheduler.from_config({}).own, num_inference_steps=2) == [1.0, pytest.approx(0.001)]
    with pytest.raises(ModelError, match="with the fields shift, speed: give the scheduler itself"):
        FlowSDEScheduler.from_config({"shift": 4.0, "speed": 2})
    with pytest.raises(ModelError, match="WarpScheduler is no sampler of diffusers"):
        FlowSDEScheduler.from_config({"_class_name": "WarpScheduler"})


def test_what_no_sampler_can_be_made_of_is_named() -> None:
    euler = {"_class_name": "FlowMatchEulerDiscreteScheduler"}
    for wrong in ({"shift": "3.0"}, {"shift": None}, {"time_shift_type": "cosine"}, {"num_train_timesteps": 0}):
        with pytest.raises(OptionError, match="FlowMatchEulerDiscreteScheduler cannot be made from its config: "):
            FlowSDEScheduler.from_config(euler | wrong)
    for strange in ("scheduler_config.json", {"_class_name": 3}, [1, 2]):
        with pytest.raises(OptionError, match="expected a scheduler, or its config with the name of its class, got "):
            FlowSDEScheduler.from_config(strange)


def test_a_sampler_of_unknown_make_goes_by_its_times() -> None:
    """A class of the user's own can be a pipeline's sampler; what it walks shows in its sigmas."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    class Halving(FlowMatchEulerDiscreteScheduler):
        def set_timesteps(self, num_inference_steps: int = 0, **more: Any) -> None:
            self.sigmas = torch.tensor([self.config.shift**-i for i in range(num_inference_steps)] + [0.0])

    assert sampler_times(own_sampler(Halving(shift=2.0)), num_inference_steps=3) == [1.0, 0.5, 0.25]


def test_a_field_that_was_registered_anew_counts() -> None:
    """diffusers' from_config puts back what it notes as a default."""
    euler = made("FlowMatchEulerDiscreteScheduler", shift=2.0)
    euler.register_to_config(shift_terminal=0.25)
    assert sampler_times(own_sampler(euler), num_inference_steps=3)[-1] == pytest.approx(0.25)
    assert sampler_times(sampler_from(sampler_facts(euler)), num_inference_steps=3)[-1] == pytest.approx(0.25)
    assert FlowSDEScheduler.from_config(euler).own.config.shift_terminal == 0.25


def test_a_sampler_of_a_users_own_is_taken_with_what_it_keeps() -> None:
    class Listed(type(made("FlowMatchEulerDiscreteScheduler"))):  # type: ignore[misc]
        def set_timesteps(self, num_inference_steps: int, **options: Any) -> None:
            super().set_timesteps(sigmas=self.listed[:num_inference_steps])

    listed = Listed()
    listed.listed = [1.0, 0.7, 0.2, 0.1]
    assert sampler_times(own_sampler(listed), num_inference_steps=3) == pytest.approx([1.0, 0.7, 0.2])
