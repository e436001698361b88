"""The held-out verifier: right on clean scenes, unmoved by dirt, and 0 for each single thing that can be wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from flowfast.errors import PromptError
from flowfast.models.scenes import data
from flowfast.models.scenes.heldout import heldout_score, heldout_soft_score
from flowfast.models.scenes.train_verifier import spoil


def scenes(n: int, seed: int) -> tuple[list[data.Scene], torch.Tensor]:
    rng = np.random.default_rng(seed)
    described = [data.sample_scene(rng, 1 + i % 5) for i in range(n)]
    return described, data.render(data.lay_out(rng, described))


@pytest.mark.parametrize("noise", [0.0, 0.03])
def test_clean_scenes_are_exact(noise: float) -> None:
    described, images = scenes(320, 11)
    images = images + noise * torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    exact = heldout_score(images.clamp(0, 1), [s.text() for s in described])
    assert set(np.unique(exact)) <= {0.0, 1.0}
    assert exact.mean() >= 0.99, f"accuracy on 320 clean scenes {exact.mean():.4f}"
    if noise == 0.0:
        assert heldout_soft_score(images, [s.text() for s in described]).mean() >= 0.995


def other(name: str, names: tuple[str, ...]) -> str:
    return names[(names.index(name) + 1) % len(names)]


WRONG: dict[str, Callable[[data.Phrase], data.Phrase]] = {
    "one more": lambda p: replace(p, count=p.count + 1),
    "one fewer": lambda p: replace(p, count=p.count - 1),
    "colour": lambda p: replace(p, colour=other(p.colour, data.COLOURS)),
    "kind": lambda p: replace(p, kind=other(p.kind, data.KINDS)),
}


@pytest.mark.parametrize("what", WRONG)
def test_one_wrong_thing_is_not_exact(what: str) -> None:
    described, images = scenes(100, 12)
    prompts, kept = [], []
    for i, scene in enumerate(described):
        phrases = (WRONG[what](scene.phrases[0]), *scene.phrases[1:])
        phrases = tuple(p for p in phrases if p.count)
        if phrases and sum(p.count for p in phrases) <= 5 and len({p.class_id for p in phrases}) == len(phrases):
            prompts.append(data.Scene(phrases).text())
            kept.append(i)
    assert len(kept) > 40
    assert heldout_score(images[kept], prompts).sum() == 0
    soft = heldout_soft_score(images[kept], prompts)
    assert (soft < 1).all() and soft.mean() > 0.2


@pytest.mark.parametrize("relation", data.RELATIONS)
def test_a_broken_relation_is_not_exact(relation: str) -> None:
    rng = np.random.default_rng(13)
    kept = data.parse_prompt(f"a red circle {relation} a blue square and one green cross")
    images = data.render(data.lay_out(rng, [kept] * 60))
    assert heldout_score(images, [kept.text()] * 60).mean() >= 0.98
    broken = f"a blue square {relation} a red circle and one green cross"
    assert heldout_score(images, [broken] * 60).sum() == 0


def test_malformed_scenes_score_low() -> None:
    """One faded, doubled, cut, merged or wrongly sized object in an otherwise right scene; slight spoiling may pass."""
    rng = np.random.default_rng(14)
    described = [data.sample_scene(rng, 1 + i % 5) for i in range(300)]
    images, _ = spoil(rng, data.lay_out(rng, described))
    assert heldout_score(images, [s.text() for s in described]).mean() < 0.15
    nothing = np.zeros((3, 3, 32, 32), np.float32)
    nothing[1], nothing[2] = np.asarray(data.BACKGROUND)[:, None, None], rng.random((3, 32, 32))
    assert heldout_score(nothing, ["one red circle"] * 3).sum() == 0
    assert heldout_score(np.full((1, 3, 32, 32), np.nan), ["one red circle"]).sum() == 0


def test_wrong_shapes_and_prompts_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected images of shape \(N, 3, 32, 32\)"):
        heldout_score(np.zeros((2, 32, 32, 3)), ["one red circle"] * 2)
    with pytest.raises(ValueError, match=r"one prompt an image \(2\), got 1"):
        heldout_score(np.zeros((2, 3, 32, 32)), ["one red circle"])
    with pytest.raises(PromptError, match="empty prompt"):
        heldout_score(np.zeros((1, 3, 32, 32)), [""])
