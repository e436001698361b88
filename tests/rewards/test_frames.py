"""Rewards over frames: the mean or the worst of what the inner reward gives each frame, on the device and the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowfast.errors import OptionError, RewardError
from flowfast.rewards import load as load_reward
from flowfast.rewards import on_host
from flowfast.rewards.frames import frames, load
from flowfast.rewards.sharpness import Sharpness

N, F = 3, 5
CLIPS = torch.rand(N, F, 3, 6, 7, generator=torch.Generator().manual_seed(1))
PROMPTS = ["a", "bb", "ccc"]
T = torch.tensor([0.0, 0.5, 1.0])


class Length(nn.Module):
    """Mean brightness, the prompt's length and t, so that a row that goes astray is seen."""

    name, range, differentiable = "length", (0.0, 100.0), True

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"length": torch.tensor([float(len(p)) for p in prompts])}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return images.mean((1, 2, 3)) + cond["length"] - 10 * t


def bright(images: Tensor, prompts: list[str]) -> Tensor:
    return images.mean((1, 2, 3)) + torch.tensor([float(len(p)) for p in prompts])


REDUCE = {"mean": lambda x: x.mean(1), "min": lambda x: x.min(1).values}


@pytest.mark.parametrize("how", REDUCE)
def test_on_the_device(how: str) -> None:
    reward = frames(Length(), how)
    assert not on_host(reward)
    assert (reward.name, reward.range, reward.differentiable) == (f"frames({how}, length)", (0.0, 100.0), True)
    assert load_reward(reward) is reward
    want = REDUCE[how](CLIPS.mean((2, 3, 4))) + torch.tensor([1.0, 2.0, 3.0]) - 10 * T
    together = reward(CLIPS, T, reward.encode(PROMPTS))
    torch.testing.assert_close(together, want)
    assert together.dtype is torch.float32
    one = slice(1, 2)
    torch.testing.assert_close(reward(CLIPS[one], T[one], reward.encode(PROMPTS[one])), together[one])


@pytest.mark.parametrize("how", REDUCE)
def test_on_the_host(how: str) -> None:
    reward = frames(bright, how)
    assert on_host(reward)
    assert reward.name == f"frames({how}, bright)"
    want = REDUCE[how](CLIPS.mean((2, 3, 4))) + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(reward(CLIPS, PROMPTS), want)


def test_mean_and_worst_differ_and_one_frame_is_the_image() -> None:
    mean, worst = (frames("sharpness", how)(CLIPS, T, {}) for how in ("mean", "min"))
    assert (worst < mean - 1e-3).all()
    still = frames("sharpness")(CLIPS[:, :1], T, {})
    torch.testing.assert_close(still, Sharpness()(CLIPS[:, 0], T, {}))


@pytest.mark.parametrize("how", REDUCE)
def test_it_scripts_and_has_a_gradient(how: str) -> None:
    reward = frames("sharpness", how)
    scripted = torch.jit.script(reward)
    assert torch.equal(scripted(CLIPS, T, scripted.encode(PROMPTS)), reward(CLIPS, T, {}))
    clips = CLIPS.clone().requires_grad_()
    reward(clips, T, {}).sum().backward()
    assert clips.grad is not None
    touched = clips.grad.flatten(2).abs().sum(2) > 0
    assert touched.sum(1).tolist() == [F if how == "mean" else 1] * N


@pytest.mark.parametrize("how", REDUCE)
def test_nan_of_a_frame_is_nan_of_the_clip(how: str) -> None:
    clips = CLIPS.clone()
    clips[1, 2] = float("nan")
    assert frames(bright, how)(clips, PROMPTS).isnan().tolist() == [False, True, False]


def test_by_name() -> None:
    assert load("sharpness").name == "frames(mean, sharpness)"
    assert load("min:sharpness").name == "frames(min, sharpness)"
    assert load("mean:sharpness").name == "frames(mean, sharpness)"


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: frames("sharpness", "max"), OptionError, "unknown how='max', choose one of mean, min"),
        (lambda: load(), OptionError, "expected the reward of a frame, got none"),
        (lambda: load("min:"), OptionError, "got none"),
        (lambda: load("beauty"), OptionError, "unknown reward 'beauty'"),
        (lambda: frames("sharpness")(CLIPS[:, 0], T, {}), RewardError, r"expected video \(N, F, 3, H, W\)"),
        (lambda: frames(bright)(CLIPS[:, 0], PROMPTS), RewardError, r"expected video \(N, F, 3, H, W\)"),
        (lambda: frames(bright)(CLIPS[:, :0], PROMPTS), RewardError, "at least one frame"),
    ],
)
def test_what_it_refuses(call: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call()
