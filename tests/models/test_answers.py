"""What the functions of an own model may answer: the same picture whatever the container, or a ModelError that says
what came; and conditions that are never stretched to fit."""

import math
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import flowfast
from flowfast.archive.load import load_archive
from flowfast.errors import FlowfastError, ModelError, OptionError, OutputError, PromptError, RewardError
from flowfast.ops.noise import noise_key
from flowfast.rewards import CallableReward
from tests.toys import GaussianFlow, NearTarget, bits, no_grad  # noqa: F401

OPTIONS: dict[str, Any] = {"budget": 24, "steps": 6, "micro_batch": 4, "method": "bon", "grid": "uniform"}
FLOW = GaussianFlow()


def total(images: Tensor, prompts: list[str]) -> Tensor:
    return images.flatten(1).sum(1)


def own(**parts: Any) -> Any:
    return flowfast.flow_from(**{"velocity": FLOW.velocity, "shape": (3,), "encode": FLOW.encode, **parts})


def run(flow: Any, prompts: list[str] = ["a", "bb"], reward: Any = total, **options: Any) -> Any:  # noqa: B006
    return flowfast.search(flow, prompts, reward=reward, **{**OPTIONS, **options}).samples


class OwnClass(GaussianFlow):
    """The same as `own`, by the protocol: answer(what, value) stands between model and search."""

    def __init__(self, what: str, answer: Any):
        super().__init__()
        self.what, self.answer = what, answer

    def encode(self, prompts: list[str]) -> Any:
        return self.answer(super().encode(prompts)) if self.what == "encode" else super().encode(prompts)

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Any:
        u = super().velocity(x_t, t, cond)
        return self.answer(u) if self.what == "velocity" else u

    def decode(self, x0: Tensor) -> Any:
        return self.answer(x0.sigmoid()) if self.what == "decode" else x0.sigmoid()


def both(what: str, answer: Any) -> list[Any]:
    """A model from functions and one of an own class that answer so."""

    def through(function: Any) -> Any:
        return lambda *given: answer(function(*given))

    parts = {"velocity": FLOW.velocity, "encode": FLOW.encode, "decode": torch.sigmoid}
    return [own(**{**parts, what: through(parts[what])}), OwnClass(what, answer)]


CONTAINERS = {
    "tuple": lambda value: (value,),
    "list": lambda value: [value],
    "output": lambda value: SimpleNamespace(sample=value),
    "mapping": lambda value: OrderedDict(anything=value),
    "named": lambda value: {"sample": value, "mask": value[:1]},
    "array": lambda value: value.numpy(),
    "float64": lambda value: value.double(),
    "strided": lambda value: value.t().contiguous().t(),
    "grad": lambda value: value.clone().requires_grad_(),
}


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("what", ["velocity", "decode"])
def test_the_same_picture_out_of_any_container(what: str, container: str) -> None:
    for plain, flow in zip(both(what, lambda value: value), both(what, CONTAINERS[container]), strict=True):
        for guidance in (1.0, 2.0):
            for one, other in zip(run(plain, guidance=guidance), run(flow, guidance=guidance), strict=True):
                assert torch.equal(bits(one.image), bits(other.image)) and one.reward == other.reward
        config = flowfast.search(flow, ["a"], reward=total, **OPTIONS).config
        (sample,) = run(flow, ["a"])
        assert torch.equal(flowfast.replay(flow, sample, config)[-1][1], sample.image)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", ["velocity", "decode"])
def test_half_precision_within_its_rounding(what: str, dtype: torch.dtype) -> None:
    for plain, flow in zip(both(what, lambda value: value), both(what, lambda value: value.to(dtype)), strict=True):
        for micro_batch in (4, 32):  # also where the model's own output is the velocity that is kept
            options = {"method": "ode", "micro_batch": micro_batch, "steps": 20}
            for one, other in zip(run(plain, **options), run(flow, **options), strict=True):
                assert other.image.dtype == other.latent.dtype == torch.float32
                assert torch.allclose(one.image, other.image, atol=0.03)


def test_whole_numbers_are_a_velocity_too() -> None:
    flow = own(velocity=lambda x, t, cond: torch.ones_like(x, dtype=torch.int64))
    plain = own(velocity=lambda x, t, cond: torch.ones_like(x))
    assert torch.equal(run(flow)[0].latent, run(plain)[0].latent)


WRONG = {
    "nothing": (lambda value: None, "NoneType"),
    "number": (lambda value: 0.5, "float"),
    "pair": (lambda value: (value, value), "tuple of 2"),
    "two": (lambda value: {"a": value, "b": value}, "of 2"),
    "text": (lambda value: "u", "str"),
    "complex": (lambda value: value + 1j, "complex"),
    "bool": (lambda value: value > 0, "bool"),
    "rows": (lambda value: value[:1], r"\(1, 3\)"),
    "more rows": (lambda value: torch.cat([value, value]), r"\(8, 3\)"),
    "no rows": (lambda value: value[0], r"\(3,\)"),
    "elsewhere": (lambda value: value.to("meta"), "meta"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("what", ["velocity", "decode"])
@pytest.mark.parametrize("method", ["bon", "rbf"])
def test_what_cannot_be_meant_is_refused_by_what_came(method: str, what: str, name: str) -> None:
    answer, came = WRONG[name]
    for flow in both(what, answer):
        with pytest.raises(ModelError, match=f"{what} must return .*{came}"):
            run(flow, method=method)


def test_transposed_latents_are_no_velocity() -> None:
    flow = flowfast.flow_from(lambda x, t, cond: x.permute(0, 2, 3, 1), shape=(3, 4, 4))
    with pytest.raises(ModelError, match=r"shape of x_t, \(4, 3, 4, 4\), got \(4, 4, 4, 3\)"):
        run(flow)


def pictures(x0: Tensor) -> Tensor:
    """(N, 3, 2, 2) uint8."""
    return (x0.sigmoid() * 255).round().to(torch.uint8)[:, :, None, None].expand(-1, -1, 2, 2)


@pytest.mark.parametrize(
    "decode",
    [
        pictures,
        lambda x0: pictures(x0).numpy(),
        lambda x0: [Image.fromarray(each.permute(1, 2, 0).contiguous().numpy()) for each in pictures(x0)],
        lambda x0: list(pictures(x0)),
        lambda x0: [each.float() / 255 for each in pictures(x0)],
        lambda x0: [pictures(x0)],
    ],
    ids=["uint8", "array", "PIL", "list", "list of floats", "batch in a list"],
)
def test_pictures_of_8_bits_are_divided_by_255(decode: Any) -> None:
    wanted = run(own(decode=lambda x0: pictures(x0).float() / 255), top_k=2)
    for one, other in zip(wanted, run(own(decode=decode), top_k=2), strict=True):
        assert torch.equal(one.image, other.image) and one.reward == other.reward


def test_a_preview_that_answers_wrongly_is_named() -> None:
    with pytest.raises(ModelError, match="preview must return one image a latent"):
        run(own(preview=lambda x0: x0[:1]))
    with pytest.raises(ModelError, match="the model's preview raised ZeroDivisionError"):
        run(own(preview=lambda x0: 1 / 0))


# ---- encode ----


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_conditions_as_arrays_or_other_mappings(guidance: float) -> None:
    plain = run(own(), guidance=guidance)
    arrays = own(encode=lambda prompts: {name: value.numpy() for name, value in FLOW.encode(prompts).items()})
    ordered = own(encode=lambda prompts: OrderedDict(FLOW.encode(prompts)))
    for flow in (arrays, ordered):
        assert torch.equal(run(flow, guidance=guidance)[0].latent, plain[0].latent)
    (sample,) = run(arrays, ["a"], guidance=guidance)
    config = flowfast.search(arrays, ["a"], reward=total, guidance=guidance, **OPTIONS).config
    assert torch.equal(flowfast.replay(arrays, sample, config)[-1][1], sample.image)


def test_a_model_may_know_nothing_of_prompts() -> None:
    def velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return x / (t.view(-1, 1) + 1)

    wanted = run(flowfast.flow_from(velocity, shape=(3,)))
    found = run(flowfast.flow_from(velocity, shape=(3,), encode=lambda prompts: {}), guidance=2.0, budget=48)
    assert torch.allclose(found[0].latent, wanted[0].latent, atol=1e-5)


@pytest.mark.parametrize(
    ("encode", "came"),
    [
        (lambda prompts: torch.zeros(len(prompts), 1), "got Tensor"),
        (lambda prompts: [0.0] * len(prompts), "got list"),
        (lambda prompts: np.zeros(len(prompts)), "got ndarray"),
        (lambda prompts: None, "got NoneType"),
        (lambda prompts: {"mean": [0.0] * len(prompts)}, "got list as 'mean'"),
        (lambda prompts: {"mean": np.array(prompts)}, "got ndarray as 'mean'"),
        (lambda prompts: {1: torch.zeros(len(prompts))}, "as 1"),
        (lambda prompts: {"mean": torch.zeros(1, 1)}, r"2 here, got the shape \(1, 1\) as 'mean'"),
        (lambda prompts: {"mean": torch.zeros(())}, r"got the shape \(\) as 'mean'"),
    ],
)
def test_conditions_that_are_none_are_refused_by_what_came(encode: Any, came: str) -> None:
    with pytest.raises(ModelError, match=f"encode must return a .*{came}"):
        run(own(encode=encode))

    class Asking(NearTarget):
        def encode(self, prompts: list[str]) -> Any:
            return encode(prompts)

    with pytest.raises(RewardError, match=f"encode of reward 'near-target' must return a .*{came}"):
        run(own(), reward=Asking())


def padded(prompts: list[str]) -> dict[str, Tensor]:
    """A row of letters, as long as the longest of the call; the empty prompt has one token."""
    width = max(1, *(len(prompt) for prompt in prompts))
    rows = [[float(ord(c) - ord("a") + 1) for c in prompt.ljust(width, "`")] for prompt in prompts]
    return {"tokens": torch.tensor(rows, dtype=torch.float32)}


def by_tokens(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
    """x0_hat is the sum of the tokens: u = (x - x0) / t."""
    return (x - cond["tokens"].sum(1, keepdim=True)) / t.view(-1, 1)


@pytest.mark.parametrize("prompts", [["abc"], ["abc", "a"], ["cc", "abc", "b"]], ids=len)
def test_the_null_prompt_keeps_its_own_shape(prompts: list[str]) -> None:
    """x0_null + 2 (x0 - x0_null), the null prompt one token; it once was stretched to three."""
    flow = flowfast.flow_from(by_tokens, shape=(2,), encode=padded)
    options = {"method": "ode", "budget": 100, "guidance": 2.0, "negative_prompt": "e"}
    result = flowfast.search(flow, prompts, reward=total, **{**OPTIONS, **options})
    for prompt, sample in zip(prompts, result.samples, strict=True):
        own_sum = sum(ord(c) - ord("a") + 1 for c in prompt)
        assert sample.latent.tolist() == pytest.approx([5 + 2 * (own_sum - 5)] * 2, abs=1e-4)
    alone = flowfast.search(flow, ["abc"], reward=total, **{**OPTIONS, **options})
    assert torch.equal(flowfast.replay(flow, alone.samples[0], alone.config)[-1][1], alone.samples[0].image)


def test_an_archive_keeps_the_null_prompt_as_it_is(tmp_path: Path) -> None:
    flow = flowfast.flow_from(by_tokens, shape=(2,), encode=padded)
    options: dict[str, Any] = {**OPTIONS, "budget": 48, "guidance": 2.0, "negative_prompt": "e"}
    flowfast.export(flow, tmp_path / "a.ffa", reward="host", prompts=["abc", "ab`"], slots=1, **options)
    archive = load_archive(tmp_path / "a.ffa")
    archive.admit(0, archive.encode(["abc"]), {}, noise_key(0, "abc"), 48, 2.0, math.inf)
    while archive.width() > 0:
        archive.observe(total(archive.propose(), []))
    (sample,) = flowfast.search(flow, ["abc"], reward=total, slots=1, **options).samples
    found = archive.release(0)
    assert torch.equal(bits(found["x0"][0]), bits(sample.latent))
    with pytest.raises(ModelError, match=r"packages take prompts of one shape, but the null prompt has .*\[1\].*\[3\]"):
        flowfast.export(flow, tmp_path / "b.ffa", reward="host", prompts=["abc"], format="aoti", **options)


# ---- what raises ----


@pytest.mark.parametrize("what", ["velocity", "decode", "encode"])
def test_what_raises_is_named_in_one_line(what: str) -> None:
    def answer(value: Any) -> Any:
        raise KeyError("the adapter\nis not loaded")

    for flow in both(what, answer):
        with pytest.raises(ModelError, match=f"the model's {what} raised KeyError: .*adapter") as caught:
            run(flow)
        assert "\n" not in str(caught.value) and isinstance(caught.value.__cause__, KeyError)
        if what != "encode":
            sample = run(own(), ["a"])[0]
            with pytest.raises(ModelError, match=f"the model's {what} raised KeyError"):
                flowfast.replay(flow, sample, flowfast.SearchConfig(**OPTIONS, interpolant="linear", diffusion="zero"))


ARRAYS = {
    "big-endian": lambda array: array.astype(">f4"),
    "backwards": lambda array: array[:, ::-1].copy()[:, ::-1],
    "longdouble": lambda array: array.astype(np.longdouble),
    "read-only": lambda array: np.frombuffer(array.tobytes(), array.dtype).reshape(array.shape),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("kind", ARRAYS)
@pytest.mark.parametrize("what", ["velocity", "decode", "encode"])
def test_arrays_of_any_byte_order_and_strides(what: str, kind: str) -> None:
    def answer(value: Any) -> Any:
        change = ARRAYS[kind]
        if what == "encode":
            return {name: change(each.numpy()) if each.dim() > 1 else each for name, each in value.items()}
        return change(value.numpy())

    plain = run(own(decode=torch.sigmoid))
    for flow in both(what, answer):
        assert [one.latent.tolist() for one in run(flow)] == [one.latent.tolist() for one in plain]


@pytest.mark.parametrize("kind", ["sparse", "nested", "quantized", "meta"])
@pytest.mark.parametrize("what", ["velocity", "decode", "encode", "reward"])
def test_tensors_without_numbers_in_rows_are_refused_by_what_they_are(what: str, kind: str) -> None:
    make = {
        "sparse": lambda value: value.to_sparse(),
        "nested": lambda value: torch.nested.nested_tensor(list(value)),
        "quantized": lambda value: torch.quantize_per_tensor(value.float(), 0.1, 0, torch.qint8),
        "meta": lambda value: value.to("meta"),
    }[kind]
    if what == "reward":
        with pytest.raises(RewardError, match=f"total.*a tensor of .*, {kind}"):
            run(own(), reward=CallableReward(lambda images, prompts: make(total(images, prompts)), "total"))
        return
    for flow in both(what, lambda value: {k: make(v) for k, v in value.items()} if what == "encode" else make(value)):
        with pytest.raises(ModelError, match=f"{what} must return .*{kind}"):
            run(flow)


def test_a_masked_number_is_no_score() -> None:
    """The highest score is masked, which must not win by what stands under the mask."""

    def masked(images: Tensor, prompts: list[str]) -> Any:
        scores = total(images, prompts).numpy()
        return np.ma.masked_array(scores, mask=scores > 1.5)

    assert max(one.reward for one in run(own())) > 1.5
    assert all(one.reward <= 1.5 for one in run(own(), reward=masked, budget=60))


# ---- memory that is not theirs ----


@pytest.mark.parametrize("what", ["velocity", "decode", "preview"])
def test_a_function_that_writes_into_its_latents_is_refused(what: str) -> None:
    """It once changed what came out, without a word."""
    flow = own(**{what: lambda latents, *rest: latents.mul_(0.5)})
    with pytest.raises(ModelError, match=f"{what} changed the latents that it was given in place.*x.clone"):
        run(flow)


@pytest.mark.parametrize("gradient", [None, "dps:0.1"])
def test_a_reward_on_the_device_that_writes_into_its_images_is_refused(gradient: str | None) -> None:
    class Greedy(NearTarget):
        def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
            return super().forward(images.mul_(0.5), t, cond)

    with pytest.raises(RewardError, match="near-target.*(in place: let it work on a copy|in-place operation)"):
        run(own(), reward=Greedy(), gradient=gradient)


def test_a_reward_on_the_host_may_write_into_its_images() -> None:
    plain = run(own())
    found = run(own(), reward=lambda images, prompts: images.mul_(2).flatten(1).sum(1) / 2)
    assert [one.image.tolist() for one in found] == [one.image.tolist() for one in plain]


def test_answers_in_the_same_memory_are_refused_where_two_are_needed() -> None:
    """The last picture once stood for all of a round, and the null velocity for both."""
    memory = torch.zeros(64, 3)

    def into(function: Any) -> Any:
        return lambda x, *rest: memory[: len(x)].copy_(function(x, *rest))

    with pytest.raises(ModelError, match="decode writes its answers into the same memory"):
        run(own(decode=into(torch.sigmoid)), micro_batch=2)
    overlapping = {"micro_batch": None, "method": "svdd"}  # two batches
    for options in ({"guidance": 2.0}, overlapping):  # two passes; rounds that overlap
        with pytest.raises(ModelError, match="velocity writes its answers into the same memory"):
            run(own(velocity=into(FLOW.velocity)), **options)
    plain, found = (run(own(velocity=v), overlap=False) for v in (FLOW.velocity, into(FLOW.velocity)))
    assert [one.image.tolist() for one in found] == [one.image.tolist() for one in plain]
    constant = own(velocity=lambda x, t, cond: memory[:1].expand_as(x), decode=lambda x: memory[:1].expand_as(x))
    assert len(run(constant, guidance=2.0)) == 2


@pytest.mark.parametrize("error", [PromptError("no such word"), KeyboardInterrupt(), SystemExit(3)])
def test_own_errors_and_interrupts_pass(error: BaseException) -> None:
    def answer(value: Any) -> Any:
        raise error

    for what in ("velocity", "decode", "encode"):
        for flow in both(what, answer):
            with pytest.raises(type(error)) as caught:
                run(flow)
            assert str(error) in str(caught.value)


def test_a_reward_whose_encode_raises_is_named() -> None:
    class Asking(NearTarget):
        def encode(self, prompts: list[str]) -> Any:
            raise OSError("no vocabulary")

    with pytest.raises(RewardError, match="encode of reward 'near-target' raised OSError: no vocabulary"):
        run(own(), reward=Asking())


# ---- latents ----


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_latents_of_any_real_type_are_taken_as_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    latents = torch.tensor([[1.0, -2.0, 0.0], [3.0, 1.0, -1.0]])
    plain = run(own(), latents=latents, method="ode")
    found = run(own(), latents=latents.to(dtype), method="ode", checkpoint=tmp_path / "held.safetensors")
    assert [one.latent.tolist() for one in plain] == [one.latent.tolist() for one in found]


@pytest.mark.parametrize(
    ("latents", "came"),
    [
        (torch.zeros(2, 3, dtype=torch.complex64), "complex"),
        (torch.zeros(2, 3, dtype=torch.bool), "bool"),
        ([[0.0] * 3] * 2, "list"),
        (torch.tensor([[math.nan, 0, 0], [0, 0, 0]]), "NaN"),
        (torch.zeros(1, 3), r"\(1, 3\)"),
        (torch.zeros(3), r"\(3,\)"),
    ],
)
def test_other_latents_are_refused_before_anything_runs(latents: Any, came: str) -> None:
    def velocity(x: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        raise AssertionError("it ran")

    with pytest.raises(OptionError, match=f"latents.*{came}"):
        run(own(velocity=velocity), latents=latents, method="ode")


def test_latents_of_each_chain_with_a_budget_in_seconds() -> None:
    """A round is measured with another number of chains; that once refused them."""
    (sample,) = run(own(), ["a"], method="rbf", budget=None, seconds=1.0, chains=3, latents=torch.ones(1, 3, 3))
    assert sample.latent.isfinite().all()


def test_a_replay_takes_the_latents_of_one_sample() -> None:
    result = flowfast.search(own(), ["a"], reward=total, latents=torch.ones(1, 3), **{**OPTIONS, "method": "ode"})
    sample = result.samples[0]
    assert torch.equal(flowfast.replay(own(), sample, result.config, latents=torch.ones(3))[-1][1], sample.image)
    with pytest.raises(FlowfastError, match=r"latents must have the shape of one latent, \(3,\), got \(1,\)"):
        flowfast.replay(own(), sample, result.config, latents=torch.ones(1))


# ---- facts ----


@pytest.mark.parametrize("shape", [(), 3, (0, 4), (3, -1), (2.5,), (True, 3), "34", None], ids=str)
def test_a_shape_that_is_none_is_refused(shape: Any) -> None:
    with pytest.raises(OptionError, match="expected shape to be the positive sizes"):
        flowfast.flow_from(FLOW.velocity, shape=shape)
    other = GaussianFlow()
    other.shape = shape
    with pytest.raises(OptionError, match="expected shape to be the positive sizes"):
        run(other)


def test_shapes_of_other_libraries_and_shapes_that_raise() -> None:
    plain = run(own())[0].latent
    for shape in (np.array([3]), torch.Size([3]), [np.int64(3)]):
        assert torch.equal(run(own(shape=shape))[0].latent, plain)

    class Raising:
        interpolant, t_finish, guidance = "linear", 0.1, 1.0
        encode, velocity, decode = FLOW.encode, FLOW.velocity, FLOW.decode

        @property
        def shape(self) -> tuple[int, ...]:
            raise AttributeError("no pipeline yet")

    with pytest.raises(ModelError, match="the model's shape raised AttributeError: no pipeline yet"):
        run(Raising())


@pytest.mark.parametrize("part", ["velocity", "decode", "encode", "preview"])
def test_a_part_that_is_no_function_is_refused(part: str) -> None:
    with pytest.raises(OptionError, match=f"expected {part} to be a function, got Tensor"):
        own(**{part: torch.zeros(3)})


@pytest.mark.parametrize("seconds", [-1.0, math.nan, "5", True])
def test_seconds_between_checkpoints_have_bounds(seconds: float, tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="checkpoint_seconds must be a number, at least 0"):
        run(own(), checkpoint=tmp_path / "a", checkpoint_seconds=seconds)


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"config": {"steps": 3}}, "config to be a SearchConfig, got dict"),
        ({"on_round": 3}, "on_round to be a function, got int"),
        ({"on_sample": "print"}, "on_sample to be a function, got str"),
        ({"on_progress": []}, "on_progress to be a function, got list"),
        ({"checkpoint": 3}, "checkpoint to be the path of a file, got 3"),
        ({"checkpoint": "a\0b"}, "checkpoint to be the path of a file, got 'a"),
    ],
    ids=str,
)
def test_what_a_call_takes_beside_options_is_checked_too(asked: dict[str, Any], expected: str) -> None:
    with pytest.raises(OptionError, match=f"expected {expected}"):
        run(own(velocity=lambda *_: pytest.fail("it ran")), **asked)


def test_a_name_too_long_for_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match="cannot write .*too long"):
        run(own(), checkpoint=tmp_path / ("x" * 300))


def test_a_replay_takes_the_config_and_latents_that_belong_to_its_sample() -> None:
    result = flowfast.search(own(), ["a"], reward=total, **OPTIONS)
    other = result.config.model_copy(update={"steps": 3})
    winner = replace(result.samples[0].winner, path=())
    pathless = replace(result.samples[0], top=(replace(result.samples[0].top[0], winner=winner),))
    for sample, config, latents, message in (
        (result.samples[0], other, None, "path of 7 steps is none of this configuration's 5 transitions"),
        (pathless, result.config, None, "path of 0 steps"),
        (result.samples[0], None, None, "config to be a SearchConfig, got NoneType"),
        (result.samples[0], result.config, torch.full((3,), math.nan), "latents must be finite"),
        (
            result.samples[0],
            result.config,
            torch.zeros(3, dtype=torch.complex64),
            "latents .* real numbers, got .*complex",
        ),
        (result.samples[0], result.config, [0.0] * 3, "latents must be a tensor of real numbers, got list"),
    ):
        with pytest.raises(OptionError, match=message):
            flowfast.replay(own(), sample, config, latents)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["ode", "bon", "svdd", "rbf", "smc", "code"])
def test_a_schedule_without_a_finished_row_is_refused_before_it_runs(method: str) -> None:
    """It once ran to its end and said that no sample had a reward."""
    with pytest.raises(OptionError, match=r"with tail=0 a trajectory ends at t = 0\..*: leave tail out, or raise it"):
        run(own(velocity=lambda *_: pytest.fail("it ran")), method=method, tail=0)
    assert len(run(own(t_finish=0.5), method="bon", tail=0)) == 2  # the grid ends below it


@pytest.mark.parametrize(
    "fact",
    [{"t_finish": math.nan}, {"t_finish": -0.1}, {"guidance": math.nan}, {"t_finish": "late"}, {"guidance": None}],
    ids=str,
)
def test_facts_of_a_model_have_bounds(fact: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match=f"{next(iter(fact))}.*got"):
        run(own(**fact))
