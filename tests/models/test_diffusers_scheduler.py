"""The schedulers inside diffusers' own pipelines: the Euler method at zero diffusion, addressed noise, and searches
that find more than no search does."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from flowfast.errors import ModelError, OptionError, RewardError
from flowfast.methods import METHODS as SEARCH_METHODS
from flowfast.models.diffusers import from_diffusers
from flowfast.models.diffusers.scheduler import METHODS, FlowSDEScheduler, FlowSearchScheduler
from tests.models.tiny.flux import flux
from tests.models.tiny.sd3 import sd3
from tests.models.tiny.wan import wan

PROMPTS = ["a red cat", "two dogs on a blue sofa"]
SIZE = {"height": 16, "width": 24}
STEPS = 6
PIPES = {
    "flux": (flux, {**SIZE, "max_sequence_length": 48, "guidance_scale": 2.5}),
    "sd3": (sd3, {**SIZE, "max_sequence_length": 48, "guidance_scale": 3.0}),
    "sd3-dynamic": (lambda: sd3(dynamic_shift=True), {**SIZE, "max_sequence_length": 48, "guidance_scale": 1.0}),
    "wan": (wan, {"height": 16, "width": 32, "num_frames": 5, "max_sequence_length": 48}),
}


def run(pipe: Any, call: dict[str, Any], prompts: list[str] = PROMPTS, each: int = 1, steps: int = STEPS) -> Tensor:
    """Final latents of each prompt's rows, from initial noise that a row keeps whatever stands beside it."""
    pipe.set_progress_bar_config(disable=True)
    many = "num_videos_per_prompt" if "num_frames" in call else "num_images_per_prompt"
    generators = [torch.Generator().manual_seed(100 * i + j) for i in range(len(prompts)) for j in range(each)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(
            prompts, num_inference_steps=steps, generator=generators, output_type="latent", **{many: each}, **call
        )[0]


@pytest.mark.parametrize("name", PIPES)
def test_zero_diffusion_is_the_euler_method(name: str) -> None:
    build, call = PIPES[name]
    pipe = build()
    expected = run(pipe, call)
    own = pipe.scheduler
    pipe.scheduler = FlowSDEScheduler.from_config(own.config, diffusion="zero")
    torch.testing.assert_close(run(pipe, call), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(pipe.scheduler.sigmas, own.sigmas)
    torch.testing.assert_close(pipe.scheduler.timesteps, own.timesteps)
    # Noise on the way leads elsewhere.
    pipe.scheduler = FlowSDEScheduler.from_config(own.config)
    assert not torch.allclose(run(pipe, call), expected, atol=1e-2)


def test_a_schedulers_own_times_are_kept() -> None:
    """Wan comes with UniPC; its noise-free times are what is walked."""
    from diffusers import UniPCMultistepScheduler

    own = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    ours = FlowSDEScheduler.from_config(own, interpolant="vp", diffusion="square:1")
    assert ours.config.flow_shift == 3.0
    own.set_timesteps(7)
    ours.set_timesteps(7)
    torch.testing.assert_close(ours.sigmas[1:], own.sigmas[1:])
    assert 0.99 < float(ours.sigmas[0]) < 0.995  # VP starts a little below pure noise


def test_noise_hangs_on_seed_and_row_alone() -> None:
    pipe, call = flux(), PIPES["flux"][1]
    config = pipe.scheduler.config
    pipe.scheduler = FlowSDEScheduler.from_config(config, diffusion="square:3", seed=7)
    four = run(pipe, call, PROMPTS[:1], each=4)
    torch.testing.assert_close(run(pipe, call, PROMPTS[:1], each=4), four, rtol=0, atol=0)
    torch.testing.assert_close(run(pipe, call, PROMPTS[:1], each=2), four[:2], rtol=1e-4, atol=1e-4)
    pipe.scheduler.seed = 8
    assert not torch.allclose(run(pipe, call, PROMPTS[:1], each=4), four, atol=1e-2)


@pytest.mark.parametrize(
    "options",
    [{"diffusion": "square:1"}, {"interpolant": "vp", "diffusion": "square:1", "integrator": "exponential"}],
    ids=str,
)
def test_the_sde_keeps_a_gaussian(options: dict[str, Any]) -> None:
    """Data N(1, 1/4), whose velocity is known. The control: the same drift without its noise ends too narrow."""

    def end(scheduler: Any, quiet: bool) -> Tensor:
        scheduler.set_timesteps(100)
        x = torch.randn(4, 10_000, generator=torch.Generator().manual_seed(1))
        if quiet:
            scheduler.table[1:, 2] = 0.0
        for t in scheduler.timesteps:
            s = float(t) / 1000
            gain = (s - 0.25 * (1 - s)) / (0.25 * (1 - s) ** 2 + s**2)
            x = scheduler.step(gain * (x - (1 - s)) - 1.0, t, x).prev_sample
        return x

    scheduler = FlowSDEScheduler(**options)
    x = end(scheduler, quiet=False)
    assert abs(float(x.mean()) - 1) < 0.03 and abs(float(x.std()) - 0.5) < 0.02
    assert float(end(scheduler, quiet=True).std()) < 0.45


# ---- search ----


def reward(latents: Tensor, prompts: Any) -> Tensor:
    """High where the first half of a latent is."""
    flat = latents.flatten(1)
    return flat[:, : flat.shape[1] // 2].mean(1)


@pytest.mark.parametrize(
    "options",
    [
        {"method": "bon"},
        {"method": "smc", "temperature": 0.02},
        {"method": "svdd"},
        {"method": "svdd", "k": 4},
        {"method": "code"},
    ],
    ids=str,
)
def test_a_search_finds_more_than_no_search(options: dict[str, Any]) -> None:
    build, call = PIPES["sd3-dynamic"]
    pipe = build()
    config, each = pipe.scheduler.config, 8
    pipe.scheduler = FlowSDEScheduler.from_config(config, diffusion="square:3", seed=3)
    plain = reward(run(pipe, call, each=each), None)
    noise = {} if options["method"] == "bon" else {"diffusion": "square:3"}
    scheduler = FlowSearchScheduler.from_config(config, reward=reward, prompts=PROMPTS, seed=3, **noise, **options)
    pipe.scheduler = scheduler
    latents = run(pipe, call, each=each)
    assert scheduler.rewards is not None and len(scheduler.best) == len(PROMPTS)
    torch.testing.assert_close(scheduler.rewards, reward(latents, None), rtol=1e-5, atol=1e-5)
    for slot, best in enumerate(scheduler.best):
        rows = slice(slot * each, (slot + 1) * each)
        assert rows.start <= best < rows.stop
        assert float(scheduler.rewards[best]) == float(scheduler.rewards[rows].max())
        assert float(scheduler.rewards[best]) > float(plain[rows].mean()) + float(plain[rows].std()) / 2
        if options["method"] != "bon":  # more than the best of as many without a choice on the way
            assert float(scheduler.rewards[best]) > float(plain[rows].max())
    # A prompt's search does not feel its neighbour.
    scheduler.prompts = PROMPTS[:1]
    alone = run(pipe, call, PROMPTS[:1], each=each)
    torch.testing.assert_close(alone, latents[:each], rtol=1e-3, atol=1e-3)
    assert scheduler.best == [b for b in scheduler.best if b < each]


def test_groups_and_blocks_choose_where_they_should() -> None:
    """With velocity 0 and rewards that name their rows, the parents can be read off the states."""
    scheduler = FlowSearchScheduler.from_config(
        FlowSDEScheduler().config, method="code", k=2, block=2, reward=lambda x, p: torch.arange(4.0)
    )
    scheduler.set_timesteps(6)
    parents = []
    scheduler._branch = lambda x, u, transition, parent, key, chain: parents.append(parent.tolist()) or x  # type: ignore
    x = torch.randn(4, 10)
    for t in scheduler.timesteps:
        scheduler.step(torch.zeros_like(x), t, x)
    assert parents == [[0, 1, 2, 3], [1, 1, 3, 3], [0, 1, 2, 3], [1, 1, 3, 3], [0, 1, 2, 3]]
    assert scheduler.best == [3]


def test_images_and_a_reward_of_flowfast_are_seen() -> None:
    from flowfast import rewards

    pipe, call = flux(), PIPES["flux"][1]
    flow = from_diffusers(pipe, steps=STEPS, max_sequence_length=48, **SIZE)
    seen: list[tuple[int, ...]] = []

    def brightness(images: Tensor, prompts: list[str]) -> Tensor:
        seen.append(tuple(images.shape))
        assert prompts == [PROMPTS[0]] * 3 and float(images.min()) >= 0 and float(images.max()) <= 1
        scores = images.flatten(1).mean(1)
        scores[1] = torch.nan
        return scores

    pipe.scheduler = FlowSearchScheduler.from_config(
        pipe.scheduler.config, method="svdd", reward=brightness, decode=flow.decode, prompts=PROMPTS[:1]
    )
    run(pipe, call, PROMPTS[:1], each=3)
    assert seen == [(3, 3, 16, 24)] * STEPS
    assert float(pipe.scheduler.rewards[1]) == -float("inf") and pipe.scheduler.best != [1]
    pipe.scheduler.reward = rewards.load("sharpness")
    run(pipe, call, PROMPTS[:1], each=3)
    assert torch.isfinite(pipe.scheduler.rewards).all()


def test_a_reward_that_reads_prompts_needs_them() -> None:
    """A pipeline does not show them to its scheduler; scores for an empty text would be silently wrong."""
    from flowfast import rewards

    def length(images: Tensor, prompts: Any) -> Tensor:
        return torch.tensor([float(len(prompt)) for prompt in prompts])

    class Texts:
        def encode(self, prompts: Any) -> dict[str, Tensor]:
            return {"length": length(torch.zeros(0), prompts)}

        def __call__(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return cond["length"]

    def step(scheduler: Any) -> None:
        scheduler.set_timesteps(4)
        scheduler.step(torch.zeros(4, 3, 2, 2), scheduler.timesteps[0], torch.zeros(4, 3, 2, 2))

    config = FlowSDEScheduler().config
    for reads in (length, Texts()):
        scheduler = FlowSearchScheduler.from_config(config, method="svdd", reward=reads)
        with pytest.raises(OptionError, match=r"reads the prompts.*set scheduler\.prompts"):
            step(scheduler)
        scheduler.prompts = PROMPTS
        step(scheduler)
        scheduler.prompts = PROMPTS[0]
        step(scheduler)
    for reads_none in ("sharpness", "compressibility"):
        step(FlowSearchScheduler.from_config(config, method="svdd", reward=rewards.load(reads_none)))


def test_saved_and_loaded_it_does_the_same(tmp_path: Any) -> None:
    build, call = PIPES["sd3-dynamic"]
    pipe = build()
    pipe.scheduler = FlowSearchScheduler.from_config(
        pipe.scheduler.config, method="svdd", k=2, diffusion="square:2", seed=5, reward=reward
    )
    expected = run(pipe, call, PROMPTS[:1], each=4)
    pipe.scheduler.save_pretrained(tmp_path)
    loaded = FlowSearchScheduler.from_pretrained(tmp_path, reward=reward)
    assert (loaded.method, loaded.k, loaded.diffusion, loaded.seed) == ("svdd", 2, "square:2", 5)
    assert loaded.config.use_dynamic_shifting is True
    pipe.scheduler = loaded
    torch.testing.assert_close(run(pipe, call, PROMPTS[:1], each=4), expected, rtol=0, atol=0)
    # From one of ours to another: the pipeline's own scheduler stays at the bottom, options stay unless given.
    again = FlowSDEScheduler.from_config(loaded.config, seed=6)
    assert type(again.own).__name__ == "FlowMatchEulerDiscreteScheduler"
    assert (again.diffusion, again.seed) == ("square:2", 6)


def test_what_cannot_work_is_named() -> None:
    from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler

    config = FlowMatchEulerDiscreteScheduler().config
    make = FlowSearchScheduler.from_config
    reasons = {
        "rbf": "spends what it saved on its next step.*svdd is the same without the rollover",
        "rbf-official": "different times",
        "prune": "ends most of its particles",
        "auto": "it chooses the times",
        "sop": "goes back towards the noise",
        "ode": "the pipeline's own scheduler",
    }
    for method, reason in reasons.items():
        message = f"'{method}' cannot run inside a pipeline.*{reason}.*Use flowfast.search.*method='{method}'"
        with pytest.raises(OptionError, match=message):
            make(config, method=method, reward=reward)
    assert set(reasons) | set(METHODS) == set(SEARCH_METHODS), "a method that the scheduler does not know of"
    with pytest.raises(OptionError, match="unknown method 'best': choose one of bon, smc"):
        make(config, method="best", reward=reward)
    with pytest.raises(OptionError, match="unknown option methud of FlowSearchScheduler: choose from"):
        make(config, methud="bon")
    with pytest.raises(OptionError, match="unknown interpolant 'cubic'"):
        FlowSDEScheduler.from_config(config, interpolant="cubic")
    with pytest.raises(ModelError, match="got DDIMScheduler: it predicts epsilon"):
        FlowSDEScheduler.from_config(DDIMScheduler(prediction_type="epsilon"))
    with pytest.raises(ModelError, match="give the scheduler itself"):
        FlowSDEScheduler.from_config(UniPCMultistepScheduler(prediction_type="flow_prediction").config)
    with pytest.raises(OptionError, match="no reward"):
        make(config).set_timesteps(4)
    with pytest.raises(OptionError, match="'svdd' needs noise"):
        make(config, method="svdd", diffusion="zero", reward=reward).set_timesteps(4)
    for options in ({"prompts": PROMPTS}, {"k": 2}):
        scheduler = make(config, method="svdd", reward=reward, **options)
        scheduler.set_timesteps(4)
        with pytest.raises(OptionError, match="a batch of 3 is not"):
            scheduler.step(torch.zeros(3, 8), scheduler.timesteps[0], torch.zeros(3, 8))
    wrongs = {r"expected shape \(2,\)": lambda x, p: x, "raised ZeroDivisionError": lambda x, p: 1 / 0}
    for message, wrong in wrongs.items():
        scheduler = make(config, method="svdd", reward=wrong)
        scheduler.set_timesteps(4)
        with pytest.raises(RewardError, match=message):
            scheduler.step(torch.zeros(2, 8), scheduler.timesteps[0], torch.zeros(2, 8))
