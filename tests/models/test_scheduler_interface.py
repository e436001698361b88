"""What diffusers and its pipelines ask of any scheduler of a flow: configs, times, steps, noise; seeds of any size."""

from __future__ import annotations

import copy
import inspect
import json
import pickle
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowfast.errors import ModelError, OptionError, RewardError
from flowfast.models.diffusers.scheduler import FlowSDEScheduler, FlowSearchScheduler
from flowfast.ops.noise import noise_key
from tests.models.tiny.flux import flux

CALL: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 48, "output_type": "latent"}


def mean(latents: Tensor, prompts: Any) -> Tensor:
    return latents.float().flatten(1).mean(1)


def euler(**config: Any) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(**config)


def sde(**options: Any) -> Any:
    return FlowSDEScheduler.from_config(euler(shift=3.0), **{"diffusion": "square:2"} | options)


def search(**options: Any) -> Any:
    return FlowSearchScheduler.from_config(
        euler(shift=3.0), **{"diffusion": "square:2", "method": "svdd", "reward": mean} | options
    )


def walked(scheduler: Any, x: Tensor, steps: int = 4) -> Tensor:
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        x = scheduler.step(0.5 * x, t, x, return_dict=False)[0]
    return x


def noise(rows: int = 4) -> Tensor:
    return torch.randn(rows, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float32)


# ---- configs ----


@pytest.mark.parametrize("make", [sde, search])
def test_a_config_survives_files_and_other_schedulers(make: Any, tmp_path: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchLCMScheduler

    scheduler = make(seed=2**80)
    scheduler.save_pretrained(tmp_path)
    kept = json.loads((tmp_path / "scheduler_config.json").read_text())
    assert kept["_class_name"] == type(scheduler).__name__ and kept["seed"] == 2**80
    loaded, unused = type(scheduler).from_pretrained(tmp_path, return_unused_kwargs=True)
    assert unused == {} and type(loaded) is type(scheduler)
    same = {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}
    assert dict(loaded.config) == same
    # The pipeline's own scheduler of it, and ours of that again: options stay, as diffusers has it.
    assert scheduler.compatibles == [FlowMatchEulerDiscreteScheduler]
    back = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
    assert back.config.shift == 3.0
    again = type(scheduler).from_config(back.config)
    assert (again.seed, again.diffusion, again.config.shift) == (2**80, "square:2", 3.0)
    # What the pipeline's own scheduler has become counts, not what it was.
    other = FlowMatchEulerDiscreteScheduler.from_config(scheduler.config, shift=7.0)
    other.set_timesteps(5)
    for given in (other, other.config):
        ours = type(scheduler).from_config(given)
        ours.reward = mean
        ours.set_timesteps(5)
        torch.testing.assert_close(ours.sigmas, other.sigmas)
    lcm = FlowMatchLCMScheduler.from_config(scheduler.config)
    assert type(type(scheduler).from_config(lcm).own) is FlowMatchLCMScheduler


def test_options_of_the_pipelines_own_scheduler_are_taken_as_diffusers_takes_them() -> None:
    expected = euler(shift=5.0)
    expected.set_timesteps(4)
    changed = euler(shift=3.0)
    changed.set_shift(9.0)
    for given in (euler(shift=3.0), euler(shift=3.0).config, changed, sde(), sde().config, {}):
        scheduler = FlowSDEScheduler.from_config(given, shift=5.0, seed=3)
        scheduler.set_timesteps(4)
        torch.testing.assert_close(scheduler.sigmas, expected.sigmas)
        assert scheduler.config.shift == 5.0 and scheduler.seed == 3
    with pytest.raises(OptionError, match="unknown option shifft of FlowSDEScheduler: choose from"):
        FlowSDEScheduler.from_config(euler(), shifft=5.0)


@pytest.mark.parametrize(
    "options",
    [
        *({"temperature": value} for value in (0.0, float("nan"), float("inf"))),
        *({"k": value} for value in (0, 2.0)),
        *({"block": value} for value in (0, 1.5)),
        *({"ess_gate": value} for value in (-0.1, 1.1, float("nan"))),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="expected a finite temperature > 0, ess_gate in"):
        search(**options)


def test_a_pipeline_with_one_of_ours_is_saved_and_loaded(tmp_path: Any) -> None:
    from diffusers import FluxPipeline

    pipe = flux()
    for made in (
        FlowSDEScheduler.from_config(pipe.scheduler, diffusion="square:3", seed=4),
        FlowSearchScheduler.from_config(pipe.scheduler, method="smc", reward=mean),
    ):
        pipe.scheduler = made
        pipe.save_pretrained(tmp_path)
        assert type(FluxPipeline.from_pretrained(tmp_path).scheduler) is type(made)


def test_copies_go_on_alone() -> None:
    scheduler, x = search(), noise()
    scheduler.set_timesteps(4)
    x = scheduler.step(0.5 * x, scheduler.timesteps[0], x).prev_sample
    ends = []
    for each in (copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler)), scheduler):
        y = x
        for t in each.timesteps[1:]:
            y = each.step(0.5 * y, t, y).prev_sample
        ends.append((y, each.best))
    for y, best in ends[1:]:
        assert torch.equal(y, ends[0][0]) and best == ends[0][1]
    # A second run begins anew, with other rows too.
    assert torch.equal(walked(scheduler, noise()), walked(search(), noise()))
    assert walked(scheduler, noise(6)).shape[0] == 6 and len(scheduler.rewards) == 6


def test_copies_share_their_reward_and_decode() -> None:
    """These may be a large model, and hold what cannot be copied."""

    class Locked:
        def __init__(self) -> None:
            self.lock = threading.Lock()

        def __call__(self, latents: Tensor, prompts: Any = None) -> Tensor:
            return latents.flatten(1).mean(1)

        def decode(self, latents: Tensor) -> Tensor:
            return latents

    reward = Locked()
    scheduler = search(reward=reward, decode=reward.decode)
    copied = copy.deepcopy(scheduler)
    assert copied.reward is reward and copied.decode.__self__ is reward and copied.own is not scheduler.own
    assert torch.equal(walked(copied, noise()), walked(scheduler, noise())) and copied.best == scheduler.best


# ---- times ----


def test_times_are_found_in_every_floating_type() -> None:
    expected = walked(sde(), noise())
    for kind in (torch.float64, torch.float16, torch.bfloat16, float, np.float32):
        scheduler = sde()
        scheduler.set_timesteps(4)
        x = noise()
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t.to(kind) if isinstance(kind, torch.dtype) else kind(t), x).prev_sample
        assert torch.equal(x, expected)
    # In the middle, without set_begin_index, from every step; rounded; as a batch of one time.
    scheduler.set_timesteps(30)
    for i, t in enumerate(scheduler.timesteps):
        for asked in (t, t.bfloat16(), t.half(), t.expand(4)):
            scheduler.step_index = None
            scheduler.step(noise(), asked, noise())
            assert scheduler.step_index == i + 1


@pytest.mark.parametrize("make", [sde, search])
@pytest.mark.parametrize("index", [1, torch.tensor(1), torch.tensor(1, dtype=torch.int32), np.int64(1), True], ids=repr)
def test_an_index_is_no_time(make: Any, index: Any) -> None:
    scheduler = make()
    scheduler.set_timesteps(4)
    for _ in range(2):  # the first step, and where the place is known
        with pytest.raises(OptionError, match="an index, as of enumerate.*is no time"):
            scheduler.step(noise(), index, noise())
        scheduler.step(noise(), scheduler.timesteps[0], noise())


def test_what_is_no_time_of_the_schedule() -> None:
    scheduler = sde()
    with pytest.raises(OptionError, match="before set_timesteps"):
        scheduler.step(noise(), torch.tensor(1000.0), noise())
    scheduler.set_timesteps(4)
    for wrong in (scheduler.sigmas[1], 700.0, torch.tensor([1000.0, 500.0]), float("nan")):
        with pytest.raises(OptionError, match="expected one of scheduler.timesteps"):
            scheduler.step(noise(), wrong, noise())
    with pytest.raises(ModelError, match=r"shape \(4, 3, 4, 4\), got \(8, 3, 4, 4\)"):
        scheduler.step(noise(8), scheduler.timesteps[0], noise())
    x = walked(scheduler, noise())
    with pytest.raises(OptionError, match="all 4 steps have been made"):
        scheduler.step(x, scheduler.timesteps[-1], x)


def test_begin_index_and_number_of_steps() -> None:
    scheduler = sde(diffusion="zero")
    assert scheduler.num_inference_steps is None and len(scheduler) == 1000
    scheduler.set_timesteps(5)
    assert scheduler.num_inference_steps == 5 and scheduler.begin_index is None
    scheduler.set_begin_index(2)
    own = euler(shift=3.0)
    own.set_timesteps(5)
    own.set_begin_index(2)
    x = y = noise()
    for t in scheduler.timesteps[2:]:
        x, y = (each.step(0.3 * at, t, at).prev_sample for each, at in ((scheduler, x), (own, y)))
    torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4)
    scheduler.set_timesteps(3)
    assert scheduler.begin_index is None and scheduler.step_index is None


@pytest.mark.parametrize(
    "given",
    [
        {"sigmas": [1.0, 0.7, 0.2]},
        {"sigmas": np.array([0.6, 0.5, 0.1])},  # from an image on the way
        {"sigmas": [0.9, 0.3, 0.0]},
        {"timesteps": [999.0, 500.0, 20.0]},
        {"timesteps": torch.tensor([800.0, 400.0, 0.0])},
        {"num_inference_steps": np.int64(3)},
        {"num_inference_steps": 1},
    ],
    ids=str,
)
def test_times_that_are_given_are_those_of_the_pipelines_own(given: dict[str, Any]) -> None:
    """And the Euler method goes through them."""
    own, ours = euler(shift=2.0), FlowSDEScheduler.from_config(euler(shift=2.0), diffusion="zero")
    x = y = noise()
    own.set_timesteps(**given)
    ours.set_timesteps(**given, device="cpu")
    moving = int((own.sigmas[:-1] > 0).sum())
    torch.testing.assert_close(ours.timesteps, own.timesteps[:moving])
    torch.testing.assert_close(ours.sigmas[:-1], own.sigmas[:moving])
    for t in own.timesteps:
        x = own.step(0.3 * x, t, x).prev_sample
    for t in ours.timesteps:
        y = ours.step(0.3 * y, t, y).prev_sample
    torch.testing.assert_close(y, x, rtol=1e-4, atol=1e-4)


def test_a_lowest_time_of_zero() -> None:
    """Z-Image's pipeline sets it; nothing moves at 0."""
    ours, own = sde(), euler(shift=3.0)
    ours.sigma_min = own.sigma_min = 0.0
    ours.set_timesteps(4)
    own.set_timesteps(4)
    torch.testing.assert_close(ours.sigmas, own.sigmas[:-1])


# ---- steps and noise ----


def test_noise_is_added_as_diffusers_does() -> None:
    scheduler, own = sde(), euler(shift=3.0)
    scheduler.set_timesteps(6)
    own.set_timesteps(6)
    image = torch.linspace(-1, 1, 48).view(1, 3, 4, 4).expand(3, -1, -1, -1)
    for kind in (torch.float32, torch.bfloat16):
        sample, drawn, t = image.to(kind), noise(3).to(kind), own.timesteps[[0, 2, 5]]
        expected = own.scale_noise(sample, t, drawn)
        torch.testing.assert_close(scheduler.scale_noise(sample, t, drawn), expected)
        torch.testing.assert_close(scheduler.add_noise(sample, drawn, t), expected)
        assert scheduler.add_noise(sample, drawn, t[:1]).dtype == kind
    assert scheduler.scale_model_input(image, t[0]) is image and scheduler.scale_model_input(image) is image
    assert scheduler.init_noise_sigma == 1.0 and scheduler.order == 1
    assert torch.equal(walked(scheduler, noise()), walked(scheduler, noise()))  # tuples; twice the same
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert "generator" in inspect.signature(scheduler.step).parameters and not hasattr(scheduler, "betas")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_sixteen_bits_go_in_and_come_out(kind: torch.dtype) -> None:
    for make in (sde, search):
        scheduler = make()
        full, half = walked(scheduler, noise()), walked(scheduler, noise().to(kind))
        assert half.dtype == kind
        torch.testing.assert_close(half.float(), full, rtol=0.05, atol=0.05)
        # Latents of one type, velocities of another: the velocity's, as diffusers has it.
        scheduler.set_timesteps(4)
        assert scheduler.step(noise().to(kind), scheduler.timesteps[0], noise()).prev_sample.dtype == kind


def test_the_host_programs_state_does_not_matter() -> None:
    def run() -> tuple[Tensor, Any, Any]:
        scheduler = search()
        end = walked(scheduler, noise().float())
        return end, scheduler.timesteps, scheduler.rewards

    expected, x = run(), noise()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.enable_grad():
            found = run()
            scheduler = sde()
            scheduler.set_timesteps(4)
            # Velocities with a graph, as of a model that was not told no_grad.
            velocity = x.clone().requires_grad_() * 0.5
            assert not scheduler.step(velocity, scheduler.timesteps[0], x).prev_sample.requires_grad
    finally:
        torch.set_default_dtype(torch.float32)
    for one, other in zip(expected, found, strict=True):
        assert one.dtype == other.dtype == torch.float32 and torch.equal(one, other)


def test_an_interrupted_run_leaves_no_result() -> None:
    pipe = flux()
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = search()

    def stop(pipe: Any, i: int, t: Any, given: Any) -> Any:
        pipe._interrupt = i == 1
        return given

    pipe("a cat", num_inference_steps=4, num_images_per_prompt=3, **CALL)
    assert len(pipe.scheduler.best) == 1
    out = pipe("a cat", num_inference_steps=4, num_images_per_prompt=3, callback_on_step_end=stop, **CALL)[0]
    assert pipe.scheduler.rewards is None and pipe.scheduler.best == []
    assert pipe.scheduler.pick(out) == [int(mean(out, None).argmax())]
    with torch.inference_mode():
        out = pipe("a cat", num_inference_steps=4, num_images_per_prompt=3, **CALL)[0]
    assert pipe.scheduler.best == [int(mean(out, None).argmax())]


def test_pictures_that_are_not_finite_never_win() -> None:
    """Rewards over 8-bit pixels see a black picture, and may like it."""

    def decode(latents: Tensor) -> Tensor:
        images = latents.sigmoid()
        images[1, 0, 0, 0] = torch.nan
        return images

    black = lambda images, prompts: -(255 * images).nan_to_num(0).byte().float().flatten(1).min(1).values  # noqa: E731
    scheduler = search(method="bon", decode=decode, reward=black)
    walked(scheduler, noise())
    assert float(scheduler.rewards[1]) == -float("inf") and scheduler.best != [1]
    broken = noise()
    broken[0] = torch.inf
    scheduler = search(method="bon", reward=lambda x, p: x.nan_to_num(9.0).flatten(1).mean(1))
    walked(scheduler, broken)
    assert float(scheduler.rewards[0]) == -float("inf") and scheduler.best != [0]
    with pytest.raises(ModelError, match=r"decode raised TypeError for latents of shape \(4, 3, 4, 4\)"):
        walked(search(decode=lambda latents: latents + "x"), noise())
    with pytest.raises(ModelError, match="decode: expected 4 images, one for each latent, got 2"):
        walked(search(decode=lambda latents: latents[:2]), noise())
    with pytest.raises(RewardError, match=r"expected shape \(4,\)"):
        walked(search(reward=lambda x, p: x.flatten(1)), noise())


# ---- seeds ----


def test_any_integer_is_a_seed() -> None:
    seeds = [0, -1, 7, 2**31, 2**63 - 1, 17982163893102248868, -(2**63) - 1, 10**40]
    ends = [walked(sde(seed=seed), noise()) for seed in seeds]
    for i, end in enumerate(ends):
        assert end.isfinite().all() and not any(torch.equal(end, other) for other in ends[:i])
    assert torch.equal(walked(sde(seed=np.int64(7)), noise()), ends[2])
    assert torch.equal(walked(sde(seed=torch.tensor(7)), noise()), ends[2])
    for seed in seeds:
        walked(search(seed=seed), noise())
    scheduler = sde()
    for wrong in (3.5, "7", None, torch.Generator()):
        scheduler.seed = wrong
        with pytest.raises(OptionError, match="seed must be an integer, got"):
            scheduler.set_timesteps(4)


def test_the_key_is_that_of_flowfast() -> None:
    """Also of a prompt in a batch: by its place, so that seeds do not run into each other's prompts."""
    keys: list[list[int]] = []
    for scheduler in (sde(seed=11), search(seed=11, prompts=["a", "b"]), search(seed=11 + (1 << 32))):
        branch = scheduler._branch
        scheduler._branch = lambda x, u, transition, parent, key, chain, own=branch: (
            keys.append(key.tolist()) or own(x, u, transition, parent, key, chain)
        )
        walked(scheduler, noise(), steps=2)
    first, second, other = noise_key(11, ""), noise_key(11, "", 1), noise_key(11 + (1 << 32), "")
    assert keys == [[first] * 4, [first] * 2 + [second] * 2, [other] * 4]
