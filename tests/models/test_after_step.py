"""`best` and `rewards` are of what comes out, in pipelines that go on after their scheduler's last step too."""

from __future__ import annotations

import importlib
import types
import warnings
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from flowfast.errors import ModelError, OptionError
from flowfast.models.diffusers.after_step import FRAMES, LAST, NEVER
from flowfast.models.diffusers.scheduler import FlowSDEScheduler, FlowSearchScheduler
from tests.models.tiny import edits
from tests.models.tiny.flux import flux

SQUARE: dict[str, Any] = {"height": 16, "width": 16, "max_sequence_length": 48}
INPAINT = SQUARE | {"image": edits.picture(16, 16), "mask_image": edits.left_half(16, 16), "strength": 0.9}
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "FluxInpaint": (lambda: edits.flux_edit("FluxInpaintPipeline"), INPAINT),
    "FluxKontextInpaint": (
        lambda: edits.flux_edit("FluxKontextInpaintPipeline"),
        INPAINT | {"max_area": 256, "_auto_resize": False},
    ),
    "FluxControlNetInpaint": (edits.flux_controlnet_inpaint, INPAINT | {"control_image": edits.picture(16, 16)}),
    "FluxControlInpaint": (edits.flux_control_inpaint, INPAINT | {"control_image": edits.picture(16, 16)}),
    "ZImageInpaint": (edits.z_image_inpaint, INPAINT | {"max_sequence_length": 96, "guidance_scale": 0.0}),
    "SD3Inpaint": (edits.sd3_inpaint, INPAINT),
    "QwenImageInpaint": (edits.qwen_inpaint, INPAINT | {"max_sequence_length": 128}),
    "LTXImageToVideo": (
        edits.ltx_image_to_video,
        {"height": 32, "width": 64, "num_frames": 9, "image": edits.picture(32, 64), "max_sequence_length": 48},
    ),
    "WanImageToVideo": (
        edits.wan_image_to_video,
        {
            **{"height": 16, "width": 32, "num_frames": 5, "image": edits.picture(16, 32), "guidance_scale": 1.0},
            **{"prompt": None, "prompt_embeds": torch.linspace(-1, 1, 7 * 32).view(1, 7, 32)},
        },
    ),
}  # fmt: skip


def reward(latents: Tensor, prompts: Any) -> Tensor:
    """Looks at all of the latents, most where a mask keeps the image or a first frame stands."""
    flat = latents.float().flatten(1)
    return flat @ torch.linspace(-1, 1, flat.shape[1])


def searched(pipe: Any, call: dict[str, Any], seed: int = 0, steps: int = 5, **options: Any) -> Any:
    """What comes out of a search of four; the pipeline keeps its scheduler."""
    options = {"method": "svdd", "diffusion": "square:3"} | options
    pipe.scheduler = FlowSearchScheduler.from_config(pipe.scheduler, reward=reward, seed=seed, **options)
    pipe.set_progress_bar_config(disable=True)
    many = "num_videos_per_prompt" if "num_frames" in call else "num_images_per_prompt"
    given = {"prompt": "a cat", "output_type": "latent", many: 4, "num_inference_steps": steps} | call
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return pipe(generator=torch.Generator().manual_seed(seed), **given)[0]


@pytest.mark.parametrize("name", CASES)
def test_rewards_are_those_of_what_comes_out(name: str) -> None:
    build, call = CASES[name]
    pipe = build()
    for seed, method in enumerate(("svdd", "bon", "smc")):
        noise = {} if method == "bon" else {"diffusion": "square:3"}
        out = searched(pipe, call, seed, method=method, **{"diffusion": None} | noise)
        scheduler = pipe.scheduler
        torch.testing.assert_close(scheduler.rewards, reward(out, None), rtol=1e-5, atol=1e-5)
        assert scheduler.best == [int(reward(out, None).argmax())]


def test_pictures_are_decoded_by_the_familys_own_pipeline() -> None:
    from diffusers import FluxPipeline

    from flowfast.models.diffusers import from_diffusers

    pipe = edits.flux_edit("FluxInpaintPipeline")
    flow = from_diffusers(FluxPipeline.from_pipe(pipe), **SQUARE)
    images = searched(pipe, INPAINT | {"output_type": "pt"}, decode=flow.decode)
    torch.testing.assert_close(pipe.scheduler.rewards, reward(images, None), rtol=1e-4, atol=1e-4)
    assert pipe.scheduler.best == [int(reward(images, None).argmax())] == pipe.scheduler.pick(images)


def test_a_choice_on_the_way_sees_the_image_put_back() -> None:
    """From the second step on the reward sees the kept half as it will come out: equal for all candidates."""
    pipe = edits.sd3_inpaint()
    halves: list[float] = []

    def watch(latents: Tensor, prompts: Any) -> Tensor:
        halves.append(float(latents[..., latents.shape[-1] // 2 :].std(0).max()))
        return reward(latents, prompts)

    pipe.scheduler = FlowSearchScheduler.from_config(pipe.scheduler, method="svdd", diffusion="square:3", reward=watch)
    pipe.set_progress_bar_config(disable=True)
    pipe("a cat", num_inference_steps=5, num_images_per_prompt=4, output_type="latent", **INPAINT)
    assert halves[0] > 0.1 and max(halves[1:]) < 1e-6 and len(halves) == 5


def test_sixteen_bits_and_several_prompts() -> None:
    pipe = edits.flux_edit("FluxInpaintPipeline").to(torch.bfloat16)
    prompts = ["a cat", "two dogs"]
    out = searched(pipe, INPAINT | {"prompt": prompts}, prompts=prompts)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(pipe.scheduler.rewards, reward(out, None), rtol=1e-3, atol=1e-3)
    assert pipe.scheduler.best == [4 * i + int(reward(out, None)[4 * i : 4 * i + 4].argmax()) for i in range(2)]


def test_prompts_are_those_that_the_pipeline_was_called_with() -> None:
    """Rows of one prompt never go on from another's, and the reward reads the right texts."""
    pipe, prompts = flux(), ["a cat", "two dogs"]
    seen: list[list[str]] = []

    def longest(latents: Tensor, texts: Any) -> Tensor:
        seen.append(list(texts))
        return reward(latents, texts)

    def run(prompt: Any, **options: Any) -> Any:
        out = searched(pipe, SQUARE | {"prompt": prompt}, **options)
        pipe.scheduler.reward = longest
        return out

    told, shown = (run(prompts, prompts=given) for given in (prompts, None))
    assert torch.equal(told, shown)
    many = {"num_images_per_prompt": 4, "num_inference_steps": 3, "output_type": "latent"}
    pipe(prompts, **SQUARE | many)
    assert seen[-1] == ["a cat"] * 4 + ["two dogs"] * 4 and len(pipe.scheduler.best) == 2
    pipe("three", **SQUARE | many)
    assert seen[-1] == ["three"] * 4 and len(pipe.scheduler.best) == 1
    pipe.scheduler.prompts = ["a text for the reward"]
    pipe("three", **SQUARE | many)
    assert seen[-1] == ["a text for the reward"] * 4
    with pytest.raises(OptionError, match="FluxPipeline was called with 2 prompts, but scheduler.prompts has 1"):
        pipe(prompts, **SQUARE | many)


def test_what_is_not_known_is_refused_by_the_pipelines_name_and_can_be_picked() -> None:
    # A single step shows no mask.
    pipe = edits.flux_edit("FluxInpaintPipeline")
    out = searched(pipe, INPAINT | {"strength": 0.2})
    for read in ("best", "rewards"):
        with pytest.raises(ModelError, match=r"^FluxInpaintPipeline puts its image back.*scheduler\.pick\(images\)"):
            getattr(pipe.scheduler, read)
    assert pipe.scheduler.pick(out) == [int(reward(out, None).argmax())] == pipe.scheduler.best
    torch.testing.assert_close(pipe.scheduler.rewards, reward(out, None))
    # Latents are decoded where there is a decoder.
    pipe.scheduler.decode = lambda latents: -latents
    assert pipe.scheduler.pick(out) == [int(reward(-out, None).argmax())]
    # A pipeline derived from one that inpaints.
    base = type(pipe)
    pipe.__class__ = type("Mine", (base,), {})
    searched(pipe, INPAINT | {"strength": 0.2})
    with pytest.raises(ModelError, match="^Mine puts its image back"):
        _ = pipe.scheduler.best
    pipe.__class__ = base
    # The next run is another: known again.
    out = searched(pipe, INPAINT)
    assert pipe.scheduler.best == [int(reward(out, None).argmax())]
    # Pictures that are pasted into the original, as PIL images, arrays and tensors.
    chosen = []
    for kind in ("pil", "np", "pt"):
        out = searched(pipe, INPAINT | {"padding_mask_crop": 2, "output_type": kind} if kind == "pil" else INPAINT)
        if kind == "pil":
            with pytest.raises(ModelError, match="FluxInpaintPipeline pastes its pictures"):
                _ = pipe.scheduler.best
        pictures = out if kind == "pil" else torch.rand(4, 3, 16, 16)
        if kind == "np":
            pictures = pictures.movedim(1, -1).numpy()
        seen: list[Tensor] = []
        pipe.scheduler.reward = lambda images, prompts, seen=seen: seen.append(images) or images.flatten(1).mean(1)
        chosen += pipe.scheduler.pick(pictures)
        assert seen[0].shape == (4, 3, 16, 16) and 0 <= float(seen[0].min()) <= float(seen[0].max()) <= 1
    assert len(chosen) == 3


def test_a_callback_that_changes_latents_is_noticed() -> None:
    def run(callback: Any) -> Any:
        pipe = flux()
        searched(pipe, SQUARE | {"callback_on_step_end": callback})
        return pipe.scheduler

    assert len(run(lambda pipe, i, t, given: {"latents": given["latents"].clone()}).best) == 1
    changes = {
        "another tensor": lambda pipe, i, t, given: {"latents": given["latents"] * 1.01},
        "in place": lambda pipe, i, t, given: {"latents": given["latents"].mul_(1.01)},
        "once": lambda pipe, i, t, given: {"latents": given["latents"] + (i == 1)},
    }
    for what, change in changes.items():
        with pytest.raises(ModelError, match="FluxPipeline changes its latents between steps"):
            pytest.fail(f"{what}: {run(change).best}")


def own_loop(mix: Any, steps: int = 6) -> tuple[Any, Tensor]:
    """A loop of the user's own around a model that draws to 0, and what comes out of it."""
    scheduler = FlowSearchScheduler(method="svdd", diffusion="square:1", reward=reward)
    scheduler.set_timesteps(steps)
    noise = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(2))
    image = torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(3)).expand(4, -1, -1, -1)
    x = noise
    for i, t in enumerate(scheduler.timesteps):
        x = scheduler.step(x / max(float(t) / 1000, 1e-3), t, x).prev_sample
        there = image if i + 1 == steps else scheduler.scale_noise(image, scheduler.timesteps[i + 1 : i + 2], noise)
        x = mix(x, there, i)
    return scheduler, x


def test_soft_masks_are_found_and_changing_ones_refused() -> None:
    soft = torch.linspace(0, 1, 8).expand(4, 2, 8, 8)
    scheduler, out = own_loop(lambda x, there, i: soft * x + (1 - soft) * there)
    torch.testing.assert_close(scheduler.rewards, reward(out, None), rtol=1e-4, atol=1e-4)
    differential = lambda x, there, i: torch.where(soft > i / 6, x, there)  # noqa: E731
    scheduler, _ = own_loop(differential)
    with pytest.raises(ModelError, match="this loop changes its latents between steps"):
        _ = scheduler.best
    scheduler, out = own_loop(lambda x, there, i: x)
    torch.testing.assert_close(scheduler.rewards, reward(out, None))


def test_pipelines_that_are_known_to_go_on() -> None:
    """The lists name classes of diffusers. Pictures with sound: no search at all, before anything is chosen."""
    import diffusers

    modular = "ltx.LTXImage2VideoLoopAfterDenoiser", "wan_animate_2.WanAnimate2SegmentDenoiseInner"
    blocks = dict(name.split(".")[::-1] for name in modular)
    for name in (*LAST, *NEVER, *FRAMES):
        if name in blocks:
            module = importlib.import_module(f"diffusers.modular_pipelines.{blocks[name]}.denoise")
            assert issubclass(getattr(module, name), diffusers.ModularPipelineBlocks)
        else:
            assert issubclass(getattr(diffusers, name), diffusers.DiffusionPipeline | diffusers.ModularPipeline)
    assert not set(LAST) & set(NEVER) | set(FRAMES) & (set(LAST) | set(NEVER))

    def step(name: str, scheduler: Any) -> Any:
        class Pipeline(getattr(diffusers, name)):  # type: ignore[misc]
            def __init__(self) -> None:
                pass

            def __call__(self) -> Any:
                x = torch.randn(4, 8)
                scheduler.set_timesteps(3)
                for t in scheduler.timesteps:
                    x = scheduler.step(-x, t, x).prev_sample
                return scheduler.best

        return Pipeline()()

    for name in ("LTX2Pipeline", "SkyReelsV2DiffusionForcingPipeline"):
        with pytest.raises(ModelError, match="Pipeline walks .*FlowSDEScheduler"):
            step(name, FlowSearchScheduler(method="bon", reward=reward))
    for name in ("HunyuanVideoFramepackPipeline", "Kandinsky5I2VPipeline", "WanVACEPipeline"):
        with pytest.raises(ModelError, match=r"Pipeline .*scheduler\.pick"):
            step(name, FlowSearchScheduler(method="bon", reward=reward))
    block = importlib.import_module("diffusers.modular_pipelines.ltx.denoise").LTXImage2VideoLoopAfterDenoiser

    class Components(diffusers.LTXModularPipeline):  # type: ignore[misc]
        def __init__(self) -> None:
            self.scheduler = FlowSearchScheduler(method="bon", reward=reward)

        def unpack_latents(self, latents: Tensor, *sizes: int) -> Tensor:
            return latents

        pack_latents = unpack_latents
        pachifier = property(lambda self: self)

    components = Components()
    components.scheduler.set_timesteps(1)
    state = {"num_frames": 9, "height": 32, "width": 32} | dict.fromkeys(
        ("noise_pred", "latents"), torch.randn(4, 2, 3)
    )
    block()(components, types.SimpleNamespace(**state), 0, components.scheduler.timesteps[0])
    with pytest.raises(ModelError, match="Components puts the frame that it was given"):
        _ = components.scheduler.best
    assert len(step("FluxPipeline", FlowSearchScheduler(method="bon", reward=reward))) == 1


def test_a_time_for_each_token_is_refused_by_the_pipelines_name() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline

    from tests.models.tiny.ltx import ltx

    pipe = LTXConditionPipeline(**ltx().components)
    pipe.scheduler = FlowSDEScheduler.from_config(FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    with pytest.raises(ModelError, match="LTXConditionPipeline gives each token a time of its own"):
        pipe(prompt="a cat", height=32, width=64, num_frames=9, num_inference_steps=2, output_type="latent")


def test_nothing_to_pick_from() -> None:
    scheduler = FlowSearchScheduler(method="bon", reward=reward)
    with pytest.raises(OptionError, match="run it first"):
        scheduler.pick(torch.zeros(4, 8))
    scheduler.set_timesteps(2)
    scheduler.prompts = ["one", "two"]
    with pytest.raises(OptionError, match="a batch of 3 is not 2 prompts"):
        scheduler.pick(torch.zeros(3, 8))
    one, other = edits.picture(8, 8), edits.picture(8, 16)
    for wrong in (None, [], one, ["a.png", "b.png"], [one, other]):
        with pytest.raises(OptionError, match="expected pictures of one size"):
            scheduler.pick(wrong)
    with pytest.raises(OptionError, match=r"expected pictures \(N, H, W, 3\).*, got \(2, 8, 8\)"):
        scheduler.pick([torch.zeros(8, 8).numpy()] * 2)
    scheduler.reward = "sharpness"
    with pytest.raises(OptionError, match="reward: expected a callable, got 'sharpness'; flowfast.rewards.load"):
        scheduler.set_timesteps(2)


def test_a_decode_may_give_pictures_of_any_kind() -> None:
    """As the image processors of pipelines do."""
    kinds: list[Any] = [
        lambda x: x.sigmoid(),
        lambda x: x.sigmoid().permute(0, 2, 3, 1).numpy(),
        lambda x: list(x.sigmoid()),
        lambda x: VaeImageProcessor().postprocess(2 * x.sigmoid() - 1, "pil"),
    ]
    found = []
    for decode in kinds:
        scheduler = FlowSearchScheduler(method="bon", reward=lambda images, prompts: images[:, 0].flatten(1).mean(1))
        scheduler.decode = decode
        scheduler.set_timesteps(2)
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
        for t in scheduler.timesteps:
            x = scheduler.step(0.5 * x, t, x).prev_sample
        found.append(scheduler.rewards)
        assert scheduler.best == [int(found[0].argmax())]
    assert all(torch.allclose(each, found[0], atol=2e-3) for each in found)
    for decode, message in ((lambda x: None, "pictures of one size.*got NoneType"), (lambda x: x[:1], "expected 4 im")):
        scheduler.decode = decode
        scheduler.set_timesteps(1)
        with pytest.raises((OptionError, ModelError), match=message):
            scheduler.step(x, scheduler.timesteps[0], x)
    scheduler.prompts = 3
    scheduler.set_timesteps(1)
    with pytest.raises(OptionError, match="prompts: expected a text or several, got 3"):
        scheduler.step(x, scheduler.timesteps[0], x)


def test_what_is_picked_from_is_read_however_it_came() -> None:
    scheduler = FlowSearchScheduler(method="bon", reward=lambda images, prompts: images.flatten(1).mean(1))
    scheduler.set_timesteps(2)
    pictures = [edits.left_half(8, 8).convert("RGB"), edits.picture(8, 8)]
    best = scheduler.pick(pictures)
    gray = [edits.left_half(8, 8), pictures[1].convert("RGBA")]
    for other in (types.SimpleNamespace(images=pictures), types.SimpleNamespace(frames=pictures), iter(pictures), gray):
        assert scheduler.pick(other) == best
