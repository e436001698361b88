"""Pipelines as they stand: what users change in one after `from_diffusers`, samplers of every kind, parts that are
missing, prompts that were encoded elsewhere, scales of guidance, train mode."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flowfast
from flowfast.errors import ModelError, OptionError, PromptError
from flowfast.models.diffusers import from_diffusers
from flowfast.prompts import Prompt
from tests.models.tiny import parts
from tests.models.tiny.flux import flux
from tests.models.tiny.flux2 import klein
from tests.models.tiny.hunyuan_video import hunyuan_video
from tests.models.tiny.qwen_image import qwen_image
from tests.models.tiny.sana import sana
from tests.models.tiny.sd3 import sd3
from tests.models.tiny.wan import wan
from tests.models.tiny.z_image import z_image

PROMPT = "a green bird on a wire"
SIZE = {"height": 16, "width": 24}
VIDEO = {"height": 16, "width": 32, "frames": 5}


def brightness(images: Tensor, prompts: Any) -> Tensor:
    return images.flatten(1).mean(1)


def drawn(flow: Any, **options: Any) -> flowfast.Sample:
    """A plain sample."""
    (sample,) = flowfast.search(flow, [PROMPT], reward=brightness, method="ode", budget=12, **options).samples
    return sample


# ---- what is changed after from_diffusers ----


def fuse(module: torch.nn.Module) -> None:
    """As PEFT merges an adapter: behind the back of the weight's version."""
    for weight in module.parameters():
        weight.data += 0.1 * torch.ones_like(weight).tril() if weight.dim() == 2 else 0.0


def learn_a_word(pipe: Any) -> None:
    """As textual inversion does."""
    pipe.tokenizer_2.add_tokens(["green"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2) + 8, mean_resizing=False)


def other_decoder(pipe: Any) -> None:
    parts.seeded(7)
    pipe.vae = parts.autoencoder(4)
    pipe.vae.register_to_config(scaling_factor=0.7)


def other_sampler(pipe: Any) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=6.0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "fused into a text encoder": lambda pipe: fuse(pipe.text_encoder_2),
    "fused into the other": lambda pipe: fuse(pipe.text_encoder),
    "fused into the transformer": lambda pipe: fuse(pipe.transformer),
    "a new word": learn_a_word,
    "another text encoder": lambda pipe: setattr(pipe, "text_encoder_2", parts.t5()),
    "another transformer": lambda pipe: setattr(pipe, "transformer", flux(guidance_embeds=False).transformer),
    "another decoder": other_decoder,
    "another sampler": other_sampler,
    "another shift": lambda pipe: pipe.scheduler.set_shift(8.0),
    "another type": lambda pipe: pipe.to(torch.bfloat16),
    "another type of the transformer": lambda pipe: pipe.transformer.to(torch.float16),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("change", CHANGES)
def test_the_next_search_sees_what_was_changed(change: str) -> None:
    """For a text that was drawn before, too: as a new `from_diffusers` does."""
    pipe = flux(dynamic_shift=False)
    flow = from_diffusers(pipe, steps=3, **SIZE)
    before = drawn(flow)
    CHANGES[change](pipe)
    after, anew = drawn(flow), drawn(from_diffusers(pipe, steps=3, **SIZE))
    assert torch.equal(after.latent, anew.latent) and torch.equal(after.image, anew.image)
    assert not torch.equal(after.image, before.image)


def test_what_follows_from_another_part_follows() -> None:
    pipe = flux()
    flow = from_diffusers(pipe, **SIZE)
    assert flow.own_steps == 28
    pipe.transformer = flux(guidance_embeds=False).transformer
    assert flow.own_steps == 4
    pipe.scheduler.register_to_config(shift_terminal=0.3)
    assert flow.t_finish == pytest.approx(0.3, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize(("build", "size"), [(wan, VIDEO), (qwen_image, SIZE)])
def test_latents_are_scaled_as_the_decoder_of_now_asks(build: Callable[[], Any], size: dict[str, int]) -> None:
    pipe = build()
    flow = from_diffusers(pipe, **size)
    x0 = torch.randn(1, *flow.shape, generator=torch.Generator().manual_seed(3))
    before = flow.decode(x0)
    pipe.vae.register_to_config(latents_mean=[0.5, -0.6, 0.1, 0.9], latents_std=[0.4, 1.1, 2.0, 0.8])
    assert torch.equal(flow.decode(x0), from_diffusers(pipe, **size).decode(x0))
    assert not torch.allclose(flow.decode(x0), before, atol=1e-3)
    pipe.vae = build().vae
    assert torch.equal(flow.decode(x0), before)


def test_a_second_transformer_that_comes_later_counts() -> None:
    pipe = wan()
    flow = from_diffusers(pipe, steps=3, **VIDEO)
    before = drawn(flow).latent
    pipe.register_to_config(boundary_ratio=0.9)
    with pytest.raises(ModelError, match="this WanPipeline has no transformer_2"):
        drawn(flow)
    pipe.transformer_2 = wan().transformer
    fuse(pipe.transformer_2)
    anew = drawn(from_diffusers(pipe, steps=3, **VIDEO)).latent
    assert torch.equal(drawn(flow).latent, anew) and not torch.equal(anew, before) and flow.waits_because


def test_places_are_those_of_the_size_of_now() -> None:
    for build in (flux, klein):
        pipe = build()
        flow = from_diffusers(pipe, steps=3, height=16, width=24)
        drawn(flow)
        flow.height, flow.width = 24, 16  # as many tokens, at other places
        anew = drawn(from_diffusers(pipe, steps=3, height=24, width=16))
        assert torch.equal(drawn(flow).latent, anew.latent)


# ---- samplers ----


def with_shift(sampler: Any, shift: float) -> Any:
    sampler.set_shift(shift)
    return sampler


def samplers() -> dict[str, Any]:
    import diffusers
    from diffusers import FlowMatchEulerDiscreteScheduler as Euler

    from flowfast.models.diffusers.scheduler import FlowSDEScheduler

    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 4.0}
    return {
        "euler": Euler(shift=2.0),
        "euler with a shift of its own": with_shift(Euler(shift=2.0), 5.0),
        "karras": Euler(shift=2.0, use_karras_sigmas=True),
        "heun": diffusers.FlowMatchHeunDiscreteScheduler(shift=2.0),
        "lcm": with_shift(diffusers.FlowMatchLCMScheduler(shift=2.0), 5.0),
        "unipc": diffusers.UniPCMultistepScheduler(**flow),
        "dpm": diffusers.DPMSolverMultistepScheduler(**flow),
        "flowfast's": FlowSDEScheduler.from_config(Euler(shift=2.0)),
    }


SAMPLERS = ["euler", "euler with a shift of its own", "karras", "heun", "lcm", "unipc", "dpm", "flowfast's"]


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_are_those_of_the_pipelines_sampler(name: str) -> None:
    """Each once, in the order in which the pipeline runs through them."""
    pipe = sd3()
    pipe.scheduler = samplers()[name]
    pipe.set_progress_bar_config(disable=True)
    times = from_diffusers(pipe, **SIZE).own_times(4)
    seen: list[float] = []
    step = pipe.scheduler.step

    def watch(*args: Any, **options: Any) -> Any:
        seen.append(float(pipe.scheduler.sigmas[pipe.scheduler.step_index or 0]))
        return step(*args, **options)

    pipe.scheduler.step = watch
    pipe(PROMPT, num_inference_steps=4, guidance_scale=1.0, output_type="latent", **SIZE)
    assert len(times) == 4 and times == pytest.approx(list(dict.fromkeys(seen)), abs=1e-6)


def test_a_shift_that_was_set_is_the_one_that_holds() -> None:
    """By hand: the sampler's lowest time is still that of the shift that it was built with."""
    pipe = sd3()
    pipe.scheduler = with_shift(samplers()["euler"], 5.0)
    lowest = 2 * 0.001 / 1.001
    plain = [1 + (lowest - 1) * i / 3 for i in range(4)]
    assert from_diffusers(pipe, **SIZE).own_times(4) == pytest.approx([5 * s / (1 + 4 * s) for s in plain], abs=1e-6)


@pytest.mark.parametrize("name", ["DDIMScheduler", "EulerDiscreteScheduler", "SCMScheduler", "PNDMScheduler"])
def test_a_sampler_that_is_not_a_flows_is_refused_by_name(name: str) -> None:
    import diffusers

    pipe = sd3()
    pipe.scheduler = getattr(diffusers, name)()
    with pytest.raises(ModelError, match=f"flow's velocity, .* got {name}: it predicts (epsilon|trigflow)"):
        from_diffusers(pipe, **SIZE)


def test_other_samplers_that_cannot_be_used_are_named() -> None:
    import diffusers

    pipe = flux()
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(ModelError, match="FlowMatchEulerDiscreteScheduler: invert_sigmas"):
        from_diffusers(pipe, **SIZE)
    pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler()  # the pipeline gives sigmas, which this cannot take
    with pytest.raises(OptionError, match="FlowMatchHeunDiscreteScheduler takes no mu, sigmas"):
        from_diffusers(pipe, **SIZE)
    pipe.scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction")
    with pytest.raises(ModelError, match="UniPCMultistepScheduler: use_flow_sigmas is not set"):
        from_diffusers(pipe, **SIZE)


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "in 1 .. "),
        ("steps", 2.5, "valid integer"),
        ("height", 0, "in 1 .. 32,768"),  # not the default
        ("width", "wide", "valid integer"),
        ("max_sequence_length", -1, "in 1 .. 100,000"),
        ("distilled_guidance", float("nan"), "in 0 .. 1,000"),
        ("true_cfg", float("inf"), "in 0 .. 1,000"),
        ("true_cfg", True, "expected a number"),
    ],
)
def test_numbers_have_bounds(name: str, value: Any, expected: str) -> None:
    with pytest.raises(OptionError, match=f"option '{name}': .*{expected}.*, got {value!r}"):
        from_diffusers(flux(), **SIZE | {name: value})


def test_numbers_of_files_are_read_as_they_are_meant() -> None:
    flow = from_diffusers(flux(), height="16", width=24.0, steps=3.0)
    assert flow.shape == (24, 16) and len(flow.own_times(flow.own_steps)) == 3


# ---- guidance ----


@pytest.mark.parametrize(("build", "size"), [(flux, SIZE), (hunyuan_video, VIDEO)])
def test_the_two_guidances_of_a_distilled_model_have_two_names(build: Callable[[], Any], size: dict[str, int]) -> None:
    pipe = build()
    with pytest.raises(OptionError, match=r"guidance=3.5 can mean two things .* distilled_guidance=3.5 .*true_cfg=3.5"):
        from_diffusers(pipe, guidance=3.5, **size)
    for options, guidance, scale in (
        ({"distilled_guidance": 2.0}, 1.0, 2.0),
        ({"distilled_guidance": 2.0, "true_cfg": 0.0}, 1.0, 2.0),  # up to 1 is off
        ({"distilled_guidance": 2.0, "true_cfg": 3.0}, 3.0, 2.0),
    ):
        flow = from_diffusers(pipe, **options, **size)
        assert (flow.guidance, flow.distilled_guidance) == (guidance, scale)
    with pytest.raises(OptionError, match="guidance_scale of .*: it is called distilled_guidance here"):
        from_diffusers(pipe, guidance_scale=3.5, **size)


def test_they_cost_what_they_say() -> None:
    flow = from_diffusers(flux(), steps=3, distilled_guidance=5.0, max_sequence_length=48, **SIZE)
    one, two = drawn(flow), drawn(flow, guidance=5.0)
    assert one.nfe == one.evaluations and two.nfe == 2 * two.evaluations
    assert not torch.allclose(one.latent, two.latent, atol=1e-3)


@pytest.mark.parametrize("scale", [0, 0.0, 1.0])
def test_up_to_one_is_off_where_cards_say_so(scale: float) -> None:
    """FLUX schnell, distilled Klein, SANA; Z-Image counts from 0 on."""
    builds = (lambda: flux(guidance_embeds=False), lambda: klein(is_distilled=True), klein, sd3, sana)
    for build in builds:
        size = {"height": 32, "width": 64} if build is sana else SIZE
        assert from_diffusers(build(), guidance=scale, **size).guidance == 1.0
    assert from_diffusers(z_image(), guidance=scale, **SIZE).guidance == 1.0 + scale


# ---- parts that are missing, prompts from elsewhere ----


@pytest.mark.parametrize("name", ["transformer", "vae", "scheduler"])
def test_a_part_that_is_missing_is_named(name: str) -> None:
    pipe = flux()
    flow = from_diffusers(pipe, **SIZE)
    setattr(pipe, name, None)
    message = f"this FluxPipeline has no {name}, which a search needs: load it whole, or set pipe.{name}"
    with pytest.raises(ModelError, match=message):
        from_diffusers(pipe, **SIZE)
    with pytest.raises(ModelError, match=message):
        drawn(flow)


def without(pipe: Any, *kinds: str) -> Any:
    for name in pipe.components:
        if name.startswith(kinds):
            setattr(pipe, name, None)
    return pipe


@torch.no_grad()
def test_prompts_from_elsewhere_are_what_text_encoders_would_have_given() -> None:
    """As users have them: from `encode_prompt` of a pipeline, saved, given to a call of another."""
    whole = sd3()
    embeds = {}
    for text in (PROMPT, ""):
        text_embeds, _, pooled, _ = whole.encode_prompt(text, None, None, do_classifier_free_guidance=False)
        embeds[text] = {"prompt_embeds": text_embeds.detach(), "pooled_prompt_embeds": pooled.detach()}
    options = {"steps": 3, "guidance": 3.0, **SIZE}
    expected = drawn(from_diffusers(whole, **options))
    bare = without(sd3(), "text_encoder", "tokenizer")
    assert torch.equal(drawn(from_diffusers(bare, embeds=embeds, **options)).image, expected.image)
    flow = from_diffusers(bare, embeds={PROMPT: embeds[PROMPT]}, **options)
    with pytest.raises(
        ModelError, match=r"no text_encoder, .*embeds for the prompt '': load it whole, or give from_diff"
    ):
        drawn(flow)
    flow.embeds[""] = embeds[""]
    assert torch.equal(drawn(flow).image, expected.image)
    found = flow.encode([Prompt(PROMPT, seed=3)])
    assert torch.equal(found["text"], embeds[PROMPT]["prompt_embeds"])


def test_a_prompt_that_nobody_encoded_is_named() -> None:
    for kinds, names in ((("text_encoder",), "text_encoder, text_encoder_2"), (("tokenizer_2",), "tokenizer_2")):
        pipe = without(flux(), *kinds)
        with pytest.raises(
            ModelError, match=f"this FluxPipeline has no {names} and no embeds for the prompt '{PROMPT}'"
        ):
            drawn(from_diffusers(pipe, **SIZE))
    spare = without(sd3(), "text_encoder_3", "tokenizer_3")  # Stable Diffusion 3 does without its T5
    assert from_diffusers(spare, **SIZE).encode([PROMPT])["text"].isfinite().all()
    with pytest.raises(ModelError, match="this StableDiffusion3Pipeline has no tokenizer_3 and no embeds"):
        from_diffusers(without(sd3(), "tokenizer_3"), **SIZE).encode([PROMPT])


def test_embeds_that_do_not_fit_are_named() -> None:
    good = {"prompt_embeds": torch.zeros(1, 8, 32), "pooled_prompt_embeds": torch.zeros(1, 32)}
    for wrong, message in (
        (
            {"prompt_embeds": good["prompt_embeds"]},
            "expected prompt_embeds, pooled_prompt_embeds for this model, got prom",
        ),
        (good["prompt_embeds"], "expected prompt_embeds, pooled_prompt_embeds for this model, got Tensor"),
        (good | {"prompt_embeds": torch.zeros(8, 32)}, r"expected prompt_embeds .* with one row, got \(8, 32\)"),
        (good | {"prompt_embeds": None}, "expected prompt_embeds .* with one row, got NoneType"),
        (
            good | {"prompt_embeds": torch.zeros(1, 32)},
            r"expected prompt_embeds with 3 dim.*, got \(1, 32\) torch.float32",
        ),
        (good | {"prompt_embeds": torch.ones(1, 8, 32).long()}, r".* floating point, got \(1, 8, 32\) torch.int64"),
        (good | {"pooled_prompt_embeds": torch.zeros(1, 8, 32)}, "expected pooled_prompt_embeds with 2 dimensions"),
        (good | {"negative_prompt_embeds": torch.zeros(1, 8, 32)}, ".*; a negative prompt is a text of its own here"),
    ):
        with pytest.raises(PromptError, match=f"embeds of the prompt 'a': {message}"):
            from_diffusers(flux(), embeds={"a": wrong}, **SIZE)
    text = torch.zeros(1, 8, 32)
    masked = {"prompt_embeds_mask": torch.ones(1, 1), "prompt_embeds": text}
    with pytest.raises(PromptError, match=r"_mask of the tokens of prompt_embeds \(1, 8, 32\), got \(1, 1\)"):
        from_diffusers(qwen_image(), embeds={"a": masked}, **SIZE)
    with pytest.raises(PromptError, match=r"expected prompt_embeds with 3 dim.*, got \(1, 1, 8, 32\)"):
        from_diffusers(z_image(), embeds={"a": {"prompt_embeds": [text]}}, **SIZE)
    for value in (text, [text[0]]):  # a list as Z-Image's pipeline takes it
        flow = from_diffusers(qwen_image(), embeds={"a": {"prompt_embeds": value}}, **SIZE)
        assert int(flow.encode(["a"])["mask"].sum()) == 8
    with pytest.raises(OptionError, match="embeds: expected a mapping from texts to tensors, got str"):
        from_diffusers(flux(), embeds="file.safetensors", **SIZE)
    flow = from_diffusers(flux(), embeds={"a": good, "b": good | {"prompt_embeds": torch.zeros(1, 9, 32)}}, **SIZE)
    with pytest.raises(PromptError, match=r"text of 'a' is \(1, 8, 32\), of 'b' \(1, 9, 32\): pad them alike"):
        flow.encode(["a", "b"])


# ---- states of a host program ----


def test_a_transformer_that_keeps_results_between_calls_is_refused() -> None:
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig, apply_pyramid_attention_broadcast

    pipe = flux()
    flow = from_diffusers(pipe, steps=3, **SIZE)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.2))
    with pytest.raises(ModelError, match="the transformer keeps results .*: pipe.transformer.disable_cache()"):
        drawn(flow)
    pipe.transformer.disable_cache()
    drawn(flow)
    attention = PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(0, 1000),
        current_timestep_callback=lambda: 500,
    )
    apply_pyramid_attention_broadcast(pipe.transformer, attention)  # is_cache_enabled knows nothing of it
    with pytest.raises(ModelError, match="the transformer keeps results from one call for the next"):
        drawn(flow)


def test_a_search_under_inference_mode_leaves_nothing_that_has_no_gradient() -> None:
    flow = from_diffusers(qwen_image(), guidance=1.0, max_sequence_length=256, **SIZE)
    x0 = torch.randn(1, *flow.shape, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        flow.decode(x0)
    flow.decode(x0.requires_grad_()).sum().backward()
    assert x0.grad is not None and bool(x0.grad.any())


def test_a_search_is_not_training() -> None:
    """A pipeline out of a training loop gives what it gives in eval mode, and goes on training."""
    pipe = flux()
    expected = drawn(from_diffusers(pipe, steps=3, **SIZE))
    training = pipe.text_encoder_2, pipe.text_encoder.encoder, pipe.transformer  # a T5 drops a tenth
    for part in training:
        part.train()
    assert torch.equal(drawn(from_diffusers(pipe, steps=3, **SIZE)).image, expected.image)
    assert all(module.training for part in training for module in part.modules())


@pytest.mark.parametrize(("build", "size"), [(flux, SIZE), (qwen_image, SIZE), (wan, VIDEO)])
def test_a_pipeline_of_ones_own_class_has_its_familys_adapter(build: Callable[[], Any], size: dict[str, int]) -> None:
    """Its call, which need not name what it passes on, is not asked for defaults."""
    pipe = build()
    expected = from_diffusers(pipe, **size)

    def call(self: Any, *args: Any, **options: Any) -> Any:
        return super(type(self), self).__call__(*args, **options)

    pipe.__class__ = type("Own", (type(pipe),), {"__call__": call})
    flow = from_diffusers(pipe, **size)
    assert type(flow) is type(expected) and flow.settings == expected.settings and flow.shape == expected.shape
    assert torch.equal(flow.encode([PROMPT])["text"], expected.encode([PROMPT])["text"])
