"""Every family on a tiny random pipeline, saved and loaded again: its velocity is the pipeline's own, a plain ODE
through flowfast ends at the pipeline's own latents. An upgrade of diffusers that changes a convention fails here."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flowfast
from flowfast.errors import ModelError, OptionError, WeightError
from flowfast.models.diffusers import FAMILIES, from_diffusers
from tests.models.tiny import MODULES, Case
from tests.models.tiny.flux import flux
from tests.models.tiny.ltx import ltx
from tests.models.tiny.wan import wan

PROMPTS = ["a red cat", "two dogs on a blue sofa"]
STEPS = 4


CASES = {name: case for module in MODULES for name, case in module.CASES.items()}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture(scope="module")
def pipe(case: Case, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The pipeline as `from_pretrained` loads it from a folder."""
    from diffusers import DiffusionPipeline

    folder = tmp_path_factory.mktemp("pipeline")
    built = case.build()
    built.save_pretrained(folder, safe_serialization=True)
    loaded = DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded).__name__ in FAMILIES
    yield loaded


@pytest.fixture(scope="module")
def flow(pipe: Any, case: Case) -> Any:
    return from_diffusers(pipe, steps=STEPS, **case.size, **case.options)


@pytest.fixture
def latents(flow: Any) -> Tensor:
    return torch.randn(len(PROMPTS), *flow.shape, generator=torch.Generator().manual_seed(3))


class Watched:
    """Notes what a pipeline's scheduler is given: latents, time, velocity."""

    def __init__(self, pipe: Any, monkeypatch: pytest.MonkeyPatch):
        self.steps: list[tuple[Tensor, Tensor, Tensor]] = []
        step = pipe.scheduler.step

        def watch(velocity: Tensor, time: Tensor, latents: Tensor, *more: Any, **rest: Any) -> Any:
            self.steps.append((latents.clone(), time.clone(), velocity.clone()))
            return step(velocity, time, latents, *more, **rest)

        monkeypatch.setattr(pipe.scheduler, "step", watch)


def run(pipe: Any, case: Case, latents: Tensor, steps: int = STEPS, output: str = "latent") -> Tensor:
    """The pipeline's own final latents, or images."""
    arguments = {"num_inference_steps": steps, "output_type": output, **case.size, **case.call}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = pipe(prompt=PROMPTS, latents=case.enter(latents.clone()), **arguments)[0]
    return case.leave(pipe, found) if output == "latent" else found


@torch.no_grad()
def test_velocity_is_the_pipelines_own(
    pipe: Any, flow: Any, case: Case, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At every step, two prompts in a batch and each row at a time of its own."""
    watched = Watched(pipe, monkeypatch)
    run(pipe, case, latents)
    assert len(watched.steps) == STEPS
    cond, null = flow.encode(PROMPTS), flow.encode([case.negative] * len(PROMPTS))
    times = flow.own_times(STEPS)
    found = []
    for (x, _, _), time in zip(watched.steps, times, strict=True):
        t = torch.full((len(PROMPTS),), time)
        u = flow.velocity(x, t, cond)
        if flow.guidance != 1.0:
            base = flow.velocity(x, t, null)
            u = base + flow.guidance * (u - base)
        found.append(u)
    for u, (_, _, expected) in zip(found, watched.steps, strict=True):
        torch.testing.assert_close(u, expected.to(u.dtype), rtol=1e-5, atol=1e-5)
    assert max(float(u.std()) for u in found) > 1e-2, "the tiny model says nothing: the comparison would be empty"
    # Rows at different times in one call are what they are alone.
    x = torch.stack([watched.steps[0][0][0], watched.steps[2][0][1]])
    t = torch.tensor([times[0], times[2]])
    both = flow.velocity(x, t, cond)
    for i in range(2):
        alone = flow.velocity(x[i : i + 1], t[i : i + 1], {name: value[i : i + 1] for name, value in cond.items()})
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-5, atol=1e-5)


def test_a_plain_ode_ends_at_the_pipelines_latents(pipe: Any, flow: Any, case: Case, latents: Tensor) -> None:
    expected = run(pipe, case, latents)
    result = flowfast.search(
        flow, PROMPTS, reward=lambda images, prompts: images.flatten(1).mean(1), method="ode",
        budget=STEPS * (2 if flow.guidance != 1.0 else 1), latents=latents, negative_prompt=case.negative,
        micro_batch=2,
    )  # fmt: skip
    found = torch.stack([sample.latent for sample in result.samples])
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=1e-4, atol=1e-4)
    assert result.samples[0].nfe == STEPS * (2 if flow.guidance != 1.0 else 1)


@torch.no_grad()
def test_decoding_is_the_pipelines_own(pipe: Any, flow: Any, case: Case, latents: Tensor) -> None:
    expected, final = (run(pipe, case, latents, steps=2, output=output) for output in ("pt", "latent"))
    images = flow.decode(final)
    assert images.dtype == torch.float32 and images.shape[-3:] == (3, case.size["height"], case.size["width"])
    torch.testing.assert_close(images, expected.float(), rtol=1e-4, atol=1e-4)


def test_search_runs_with_a_few_methods(flow: Any, case: Case) -> None:
    for method in ("bon", "rbf"):
        result = flowfast.search(
            flow, PROMPTS[:1], reward=lambda images, prompts: images.flatten(1).mean(1), method=method,
            budget=24 if flow.guidance == 1.0 else 48,
        )  # fmt: skip
        assert result.samples[0].image.shape[-3:] == (3, case.size["height"], case.size["width"])


@pytest.fixture
def float64(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The pipeline in float64, so that differences tell the truth but for what it computes in float32 itself."""
    parts = [
        part for name in ("transformer", "transformer_2", "vae") if (part := getattr(pipe, name, None)) is not None
    ]
    for part in parts:
        part.double()
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    yield
    monkeypatch.undo()
    for part in parts:
        part.float()


@pytest.mark.parametrize("part", ["velocity", "decode"])
def test_its_gradient_is_finite_differences(flow: Any, latents: Tensor, float64: None, part: str) -> None:
    """No family cuts the graph. Of the steps one must fit: clamps want a small one, parts in float32 a large one."""
    cond = {
        name: value.double() if value.is_floating_point() else value for name, value in flow.encode(PROMPTS).items()
    }
    t = torch.tensor([0.7, 0.4], dtype=torch.float64)
    function = (lambda x: flow.velocity(x, t, cond)) if part == "velocity" else flow.decode
    x, generator = latents.double().requires_grad_(), torch.Generator().manual_seed(4)
    out = function(x)
    weight, direction = (torch.randn(like.shape, generator=generator) for like in (out, x))
    (gradient,) = torch.autograd.grad((out * weight).sum(), x)
    slope, errors = float((gradient * direction).sum()), []
    with torch.no_grad():
        for step in (1e-3, 1e-4, 1e-5, 1e-6):
            ends = [float((function(x + sign * step * direction) * weight).sum()) for sign in (1, -1)]
            errors.append(abs((ends[0] - ends[1]) / (2 * step) - slope))
    assert min(errors) < 1e-2 * float(gradient.norm()), (slope, errors)


def test_a_steered_search_runs_and_leaves_the_parameters_alone(flow: Any) -> None:
    reward = "frames:sharpness" if hasattr(flow, "frames") else "sharpness"
    before = [parameter.requires_grad for parameter in flow.parameters()]
    result = flowfast.search(
        flow, PROMPTS[:1], reward=reward, method="rbf", budget=24 if flow.guidance == 1.0 else 48, gradient="dps:0.1"
    )
    path = flowfast.replay(flow, result.samples[0], result.config, reward=reward)
    torch.testing.assert_close(path[-1][1], result.samples[0].image, rtol=0, atol=1e-5)  # the last bits of two families
    assert any(before) and [parameter.requires_grad for parameter in flow.parameters()] == before
    assert all(parameter.grad is None for parameter in flow.parameters())


def test_a_prompt_is_encoded_once_and_alone(flow: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its conditions have the same bits whatever stands beside it."""
    asked: list[str] = []
    plain = type(flow).encode_texts

    def watch(self: Any, texts: list[str], device: torch.device) -> Any:
        asked.extend(texts)
        return plain(self, texts, device)

    monkeypatch.setattr(type(flow), "encode_texts", watch)
    alone = flow.encode([PROMPTS[1]])
    asked.clear()
    both = flow.encode([PROMPTS[0], PROMPTS[1], PROMPTS[0]])
    assert asked == PROMPTS
    for name, value in alone.items():
        assert torch.equal(both[name][1:2], value) and torch.equal(both[name][0], both[name][2])


@torch.no_grad()
def test_what_walks_through_all_modules_is_read_once(
    flow: Any, latents: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The type once a call of the model, the device once for all prompts: diffusers looks at every module for them,
    which took 2.5 ms a call and 2 ms a prompt on a transformer of 14 blocks."""
    read = {"dtype": 0, "device": 0}

    def watched(name: str) -> property:
        plain = getattr(type(flow), name)

        def get(self: Any) -> Any:
            read[name] += 1
            return plain.fget(self)

        return property(get)

    for name in read:
        monkeypatch.setattr(type(flow), name, watched(name))
    cond = flow.encode(PROMPTS)
    assert read == {"dtype": 0, "device": 1}
    flow.velocity(latents, torch.tensor([0.95, 0.2]), cond)
    models = 2 if getattr(flow.pipe, "transformer_2", None) is not None else 1
    assert read == {"dtype": models, "device": 1}


# ---- load and from_diffusers ----


def test_a_folder_loads_by_name(tmp_path: Any) -> None:
    flux().save_pretrained(tmp_path, safe_serialization=True)
    flow = from_diffusers(tmp_path, local_files_only=True, device="cpu", height=16, width=24)
    assert flow.shape == (6 * 4, 16)
    assert flowfast.load(str(tmp_path)).shape[1] == 16


def test_memory_options_reach_the_pipeline(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, called = flux(), []
    for name in ("model", "sequential"):
        monkeypatch.setattr(type(pipe), f"enable_{name}_cpu_offload", lambda self, name=name: called.append(name))
        from_diffusers(pipe, offload=name, height=16, width=24)
    assert called == ["model", "sequential"]
    plain = from_diffusers(pipe, height=16, width=24)
    assert not pipe.vae.use_tiling and not pipe.vae.use_slicing
    x0 = torch.randn(2, *plain.shape, generator=torch.Generator().manual_seed(3))
    expected = plain.decode(x0)
    found = from_diffusers(pipe, vae_tiling=True, vae_slicing=True, height=16, width=24).decode(x0)
    assert pipe.vae.use_tiling and pipe.vae.use_slicing
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)  # one tile holds all of it
    with pytest.raises(OptionError, match="unknown offload 'disk': choose model or sequential"):
        from_diffusers(pipe, offload="disk", height=16, width=24)


def test_what_is_missing_or_wrong_is_named(tmp_path: Any) -> None:
    with pytest.raises(WeightError, match="no/such-model.*hf download no/such-model"):
        from_diffusers("no/such-model", local_files_only=True)
    with pytest.raises(OptionError, match="multiple of 4 pixels"):
        from_diffusers(flux(), height=18)
    with pytest.raises(OptionError, match="unknown option hight of FluxFlow: choose from .*height"):
        from_diffusers(flux(), hight=16)
    with pytest.raises(OptionError, match="torch_dtype: only for an id"):
        from_diffusers(flux(), torch_dtype=torch.float32)

    class StableDiffusionPipeline:
        unet = None
        scheduler = type("Scheduler", (), {"config": {"prediction_type": "epsilon"}})()

    with pytest.raises(ModelError, match="predicts epsilon, not a flow's velocity"):
        from_diffusers(StableDiffusionPipeline())


def test_videos_say_what_is_wrong() -> None:
    with pytest.raises(OptionError, match=r"frames must be 1 \+ a multiple of 4 for this model, got 6"):
        from_diffusers(wan(), frames=6, height=16, width=32)
    assert from_diffusers(wan(), frames=1, height=16, width=32).shape == (4, 1, 2, 4)
    with pytest.raises(OptionError, match="height must be a positive multiple of 16 pixels"):
        from_diffusers(wan(), frames=5, height=24, width=32)
    half = wan(boundary=0.8)
    half.register_modules(transformer_2=None)
    with pytest.raises(ModelError, match="no transformer_2, which a search needs"):
        from_diffusers(half)


@torch.no_grad()
def test_a_batch_on_both_sides_of_wan_2_2_keeps_its_size_and_waits_once() -> None:
    """A row's velocity has the same bits whichever transformer its neighbours take."""
    flow = from_diffusers(wan(boundary=0.8), frames=5, height=16, width=32, guidance=1.0, max_sequence_length=48)
    sizes: list[tuple[int, int]] = []
    for number, model in enumerate((flow.transformer, flow.pipe.transformer_2)):
        model.register_forward_pre_hook(
            lambda module, args, kwargs, number=number: sizes.append((number, len(kwargs["hidden_states"]))),
            with_kwargs=True,
        )
    x = torch.randn(3, *flow.shape, generator=torch.Generator().manual_seed(3))
    cond = flow.encode([PROMPTS[0]] * 3)
    found = {}
    for times in ([0.9, 0.95, 0.85], [0.9, 0.5, 0.3], [0.6, 0.5, 0.3]):
        sizes.clear()
        u = flow.velocity(x, torch.tensor(times), cond)
        needed = {0 if time >= 0.8 else 1 for time in times}
        assert sorted(sizes) == [(number, 3) for number in sorted(needed)]
        for row, time in enumerate(times):
            assert torch.equal(u[row], found.setdefault((row, time), u[row]))
    assert flow.waits_because and not from_diffusers(wan(), frames=5, height=16, width=32).waits_because


WAITS = {"_local_scalar_dense", "is_nonzero", "nonzero", "masked_select", "unique_dim", "_unique2"}


class Waits(TorchDispatchMode):
    """Notes what reads a value or makes a tensor out of numbers of Python, both of which wait on a device. What writes
    one number into a tensor does not."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        masks = name.startswith("index") and any(
            isinstance(index, Tensor) and index.dtype == torch.bool
            for index in (args[1] if isinstance(args[1], list | tuple) else ())
        )
        if name in WAITS or masks or (name == "lift_fresh" and args[0].numel() > 1):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_what_does_not_say_that_it_waits_does_not(flow: Any, latents: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    cond, time = flow.encode(PROMPTS), torch.tensor([0.9, 0.5])
    flow.velocity(latents, time, cond), flow.decode(latents)  # what is kept after a first call may wait there
    lists: list[int] = []
    plain = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda tensor: lists.append(1) or plain(tensor))
    with Waits() as waits:
        flow.velocity(latents, time, cond)
    if not flow.waits_because:
        assert not waits.found and not lists
    waits.found.clear(), lists.clear()
    with waits:
        flow.decode(latents)
    assert not waits.found and not lists


@torch.no_grad()
def test_noise_of_a_decoder_is_the_same_for_every_video() -> None:
    """LTX hands the last step to its decoder: the pipeline draws noise for that, a search must not."""
    size = {"frames": 9, "height": 32, "width": 64}
    flow = from_diffusers(ltx(True), decode_timestep=0.05, decode_noise_scale=0.3, **size)
    x0 = torch.randn(1, *flow.shape, generator=torch.Generator().manual_seed(3)).expand(2, -1, -1)
    videos = flow.decode(x0)
    assert videos.shape == (2, 9, 3, 32, 64) and torch.equal(videos[0], videos[1])
    assert torch.equal(videos, flow.decode(x0))
    assert not torch.allclose(videos, from_diffusers(ltx(True), **size).decode(x0), atol=1e-4)
