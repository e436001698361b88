"""The embedded model's grammar, renderer, prompt set, network, given verifier and weights."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flowfast.errors import PromptError, WeightError
from flowfast.models.scenes import data, grammar, weights
from flowfast.models.scenes.model import SceneModel, to_state
from flowfast.models.scenes.prompts import hard_prompts, make_hard_prompts, split_of
from flowfast.models.scenes.train import Muon, TrainConfig, orthogonalise, read_checkpoint, train, training_batch
from flowfast.models.scenes.verifier import SceneReward

HARD = "a red circle left of a green triangle and two blue squares"


def random_rows(n: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = data.sample_batch(np.random.default_rng(seed), n).tokens
    return torch.randn(n, 3, 32, 32, generator=generator), torch.rand(n, generator=generator), tokens


@pytest.fixture(scope="module")
def model() -> SceneModel:
    return weights.load_scenes()


@pytest.fixture(scope="module")
def reward() -> SceneReward:
    return weights.load_scene_reward()


# --- grammar ---


@pytest.mark.parametrize("seed", range(40))
def test_a_scene_survives_its_own_words(seed: int) -> None:
    scene = data.sample_scene(np.random.default_rng(seed), 1 + seed % 5)
    again = data.parse_prompt(scene.text())
    assert again.text() == scene.text()
    assert (again.counts() == scene.counts()).all() and scene.counts().sum() == 1 + seed % 5


def test_spellings_that_mean_the_same() -> None:
    first = data.parse_prompt("three red circles and one blue square")
    for text in (
        "3 red circles, a blue square",
        "Three red circles  and a blue square.",
        "three red circles, and one blue square",
    ):
        assert data.parse_prompt(text) == first
    left = data.parse_prompt("a red circle left of a blue square")
    assert data.parse_prompt("a red circle is to the left of a blue square") == left
    right = data.parse_prompt("a blue square right of a red circle")
    assert right.relation is not None and right.phrases[right.relation.subject] == data.Phrase(1, "red", "circle")


@pytest.mark.parametrize(
    ("prompt", "what"),
    [
        ("a dog", "unknown colour 'a'|unknown count|'a dog'"),
        ("three purple circles", "unknown colour 'purple'"),
        ("three red hexagons", "unknown kind 'hexagons'"),
        ("six red circles", "unknown count 'six'"),
        ("five red circles and one blue square", "5 objects at most, got 6"),
        ("a red circle and a blue square and a green cross and a red cross", "3 phrases at most, got 4"),
        ("two red circles and one red circle", "named twice"),
        ("two red circles left of a blue square", "single objects only"),
        ("a red circle left of a blue square above a green cross", "one relation at most"),
        ("and", "expected '<count> <colour> <kind>'"),
        (7, "expected a prompt of type str, got int"),
    ],
)
def test_a_bad_prompt_says_what_was_expected(prompt: str, what: str) -> None:
    with pytest.raises(PromptError, match=what) as caught:
        data.encode_prompts([prompt])
    assert "write 1-3 phrases" in str(caught.value) and "\n" not in str(caught.value)


def test_tokens_and_the_null_condition() -> None:
    tokens = data.encode_prompts(["", HARD])["tokens"]
    assert tokens.shape == (2, grammar.NUM_TOKENS, grammar.NUM_FEATURES) and tokens.dtype == torch.int64
    assert not tokens[0].any()
    assert (tokens[1, :, 0] > 0).sum() == 4 and tokens[1, :, 3].tolist() == [1, 2, 0, 0, 0]
    assert data.encode_prompts([])["tokens"].shape == (0, grammar.NUM_TOKENS, grammar.NUM_FEATURES)
    with pytest.raises(PromptError, match="list of prompts"):
        data.encode_prompts(HARD)  # type: ignore[arg-type]


# --- renderer and sampler ---


def test_the_renderer_repeats_itself_and_rows_do_not_mix() -> None:
    batch = data.sample_batch(np.random.default_rng(3), 40)
    images = data.render(batch)
    assert images.shape == (40, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    assert torch.equal(images, data.render(data.sample_batch(np.random.default_rng(3), 40)))
    one = data.SceneBatch(batch.tokens[7:8], batch.centres[7:8], batch.radii[7:8])
    assert torch.equal(data.render(one)[0], images[7])
    assert not torch.equal(images, data.render(data.sample_batch(np.random.default_rng(4), 40)))


def test_objects_keep_apart_and_relations_hold_in_the_layout() -> None:
    batch = data.sample_batch(np.random.default_rng(5), 500)
    present = batch.tokens[:, :, 0] > 0
    gap = torch.cdist(batch.centres, batch.centres) - batch.radii[:, :, None] - batch.radii[:, None, :]
    pairs = present[:, :, None] & present[:, None, :] & ~torch.eye(5, dtype=torch.bool)
    assert gap[pairs].min() > 0.5
    assert (((batch.centres - 16).abs() + 1.1 * batch.radii[..., None])[present] < 16.5).all()
    for i in torch.nonzero(batch.tokens[:, :, 3].any(1))[:, 0].tolist():
        roles = batch.tokens[i, :, 3].tolist()
        axis = 0 if 1 in roles else 1
        a, b = roles.index(1 + 2 * axis), roles.index(2 + 2 * axis)
        assert batch.centres[i, b, axis] - batch.centres[i, a, axis] > 6


def test_a_training_step_depends_on_seed_and_step_only() -> None:
    config = TrainConfig(batch=8)
    first, again, other = training_batch(config, 900), training_batch(config, 900), training_batch(config, 901)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])
    assert float(first[2].min()) > 0 and float(first[2].max()) < 1


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    def run(steps: int, out: str) -> dict[str, Tensor]:
        config = TrainConfig(batch=2, steps=steps, cooldown=1, warmup=1, evaluate_every=0, save_every=2)
        train(config, tmp_path / out, resume=True)
        return read_checkpoint(tmp_path / out / "checkpoint.safetensors")[1]["ema"]

    whole = run(4, "whole")
    run(2, "parts")
    parts = run(4, "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert not list(tmp_path.glob("*/*.tmp"))


def test_muon_orthogonalises_and_splits_fused_projections() -> None:
    x = torch.randn(3, 96, 32, generator=torch.Generator().manual_seed(0))
    singular = torch.linalg.svdvals(orthogonalise(x))
    assert singular.min() > 0.5 and singular.max() < 1.3
    gradient = torch.randn(96, 32, generator=torch.Generator().manual_seed(1))
    fused, apart = nn.Parameter(torch.zeros(96, 32)), [nn.Parameter(torch.zeros(32, 32)) for _ in range(3)]
    fused.grad = gradient.clone()
    for p, g in zip(apart, gradient.chunk(3), strict=True):
        p.grad = g.clone()
    Muon([fused], lr=0.1, split=32).step()
    Muon(apart, lr=0.1).step()
    torch.testing.assert_close(fused.detach(), torch.cat([p.detach() for p in apart]))


# --- prompt set ---


def test_the_hard_prompts_are_what_they_claim() -> None:
    everything = hard_prompts("all")
    assert len(everything) == len(set(everything)) >= 200
    assert everything == make_hard_prompts()
    assert sorted(hard_prompts("tuning") + hard_prompts("heldout")) == sorted(everything)
    assert min(len(hard_prompts("tuning")), len(hard_prompts("heldout"))) >= 100
    assert all(split_of(p) == "heldout" for p in hard_prompts("heldout"))
    scenes = [data.parse_prompt(p) for p in everything]
    assert all(len(s.phrases) >= 2 and 3 <= s.counts().sum() <= 5 for s in scenes)
    assert sum(s.relation is not None for s in scenes) >= 20
    with pytest.raises(ValueError, match="unknown split 'test'; choose"):
        hard_prompts("test")  # type: ignore[arg-type]


# --- network ---


def test_the_model_scripts_and_says_the_same(model: SceneModel, tmp_path: Path) -> None:
    scripted = torch.jit.script(model)
    torch.jit.save(scripted, tmp_path / "model.pt")
    again = torch.jit.load(tmp_path / "model.pt")
    x_t, t, tokens = random_rows(8, 0)
    u_t = model.velocity(x_t, t, {"tokens": tokens})
    assert u_t.shape == x_t.shape and u_t.dtype == torch.float32
    for other in (scripted, again):
        assert torch.equal(other.velocity(x_t, t, {"tokens": tokens}), u_t)
        assert torch.equal(other(x_t, t, {"tokens": tokens}), u_t)
        assert torch.equal(other.decode(x_t), model.decode(x_t))


@pytest.mark.parametrize("size", [2, 4, 8, 32])
def test_a_row_does_not_depend_on_its_place_or_neighbours(model: SceneModel, size: int) -> None:
    x_t, t, tokens = random_rows(1, 1)
    seen = []
    for place in range(0, size, max(1, size // 4)):
        others = random_rows(size, 10 + place)
        for whole, row in zip(others, (x_t, t, tokens), strict=True):
            whole[place] = row[0]
        with torch.inference_mode():
            seen.append(model.velocity(others[0], others[1], {"tokens": others[2]})[place])
    assert all(torch.equal(seen[0], other) for other in seen)


def test_the_order_of_phrases_and_spare_slots_do_not_matter(model: SceneModel) -> None:
    x_t, t, _ = random_rows(2, 2)
    prompts = ["two red circles and one blue square", "one blue square and two red circles"]
    x_t, t = x_t[:1].expand(2, -1, -1, -1), t[:1].expand(2)
    u_t = model.velocity(x_t, t, model.encode(prompts))
    torch.testing.assert_close(u_t[0], u_t[1], rtol=1e-4, atol=1e-4)
    null = model.velocity(x_t, t, model.encode(["", prompts[0]]))
    assert (null[0] - null[1]).abs().max() > 1e-3


def test_decode_inverts_to_state_and_stays_in_range(model: SceneModel) -> None:
    images = data.render(data.sample_batch(np.random.default_rng(6), 4))
    torch.testing.assert_close(model.decode(to_state(images)), images, rtol=0, atol=1e-6)
    wild = model.decode(100 * torch.randn(2, 3, 32, 32))
    assert wild.min() >= 0 and wild.max() <= 1


def test_the_shipped_model_predicts_velocity(model: SceneModel) -> None:
    """On fresh scenes at t = 0.5 it explains most of what a model that ignores the picture could not."""
    scenes = data.sample_batch(np.random.default_rng(8), 32)
    x0 = to_state(data.render(scenes))
    eps = torch.randn(x0.shape, generator=torch.Generator().manual_seed(8))
    with torch.inference_mode():
        u_t = model.velocity(0.5 * x0 + 0.5 * eps, torch.full((32,), 0.5), {"tokens": scenes.tokens})
        blind = model.velocity(
            0.5 * x0 + 0.5 * eps, torch.full((32,), 0.5), {"tokens": torch.zeros_like(scenes.tokens)}
        )
    loss = (u_t - (eps - x0)).square().mean()
    assert loss < 0.25 * x0.square().mean()
    assert loss < (blind - (eps - x0)).square().mean()


# --- given verifier ---


def test_the_reward_scripts_and_knows_rows_apart(reward: SceneReward) -> None:
    x, t, tokens = random_rows(16, 3)
    images = x.sigmoid()
    alone = torch.cat([reward(images[i : i + 1], t[i : i + 1], {"tokens": tokens[i : i + 1]}) for i in range(16)])
    batch = reward(images, t, {"tokens": tokens})
    assert batch.shape == (16,) and batch.dtype == torch.float32 and bool((batch <= 0).all())
    torch.testing.assert_close(alone, batch, rtol=1e-4, atol=1e-4)
    assert torch.equal(torch.jit.script(reward)(images, t, {"tokens": tokens}), batch)


def test_the_reward_prefers_what_was_asked(reward: SceneReward) -> None:
    rng = np.random.default_rng(9)
    scenes = [data.sample_scene(rng, 3 + i % 3) for i in range(96)]
    images = data.render(data.lay_out(rng, scenes))
    tokens = data.encode_prompts([s.text() for s in scenes])["tokens"]
    right = reward(images, torch.zeros(96), {"tokens": tokens})
    wrong = reward(images, torch.zeros(96), {"tokens": tokens.roll(1, 0)})
    assert (right > wrong).float().mean() > 0.97
    pairs = [
        data.parse_prompt(p) for p in ("a red circle left of a blue square", "a red circle above a blue square")
    ] * 24
    images = data.render(data.lay_out(rng, pairs))
    kept = data.encode_prompts([s.text() for s in pairs])
    broken = {"tokens": torch.where(kept["tokens"][:, :, 3:] > 0, 1 + ((kept["tokens"] - 1) ^ 1), kept["tokens"])}
    broken["tokens"][:, :, :3] = kept["tokens"][:, :, :3]
    assert (reward(images, torch.zeros(48), kept) > reward(images, torch.zeros(48), broken)).float().mean() > 0.95


def test_the_reward_has_a_gradient(reward: SceneReward) -> None:
    images = data.render(data.sample_batch(np.random.default_rng(1), 2)).requires_grad_()
    reward(images, torch.tensor([0.0, 0.4]), reward.encode([HARD, HARD])).sum().backward()
    assert images.grad is not None and bool((images.grad != 0).any()) and bool(torch.isfinite(images.grad).all())


# --- weights ---


def test_the_weights_are_small_and_their_loading_touches_no_global_generator() -> None:
    assert sum(f.stat().st_size for f in weights.FOLDER.iterdir()) <= 10 * 2**20
    card = weights.read_card()
    assert card[weights.MODEL_FILE]["parameters"] <= 2_500_000 and card[weights.REWARD_FILE]["parameters"] <= 350_000
    before = torch.random.get_rng_state()
    weights.load_scenes()
    weights.load_scene_reward()
    assert torch.equal(before, torch.random.get_rng_state())


def damage(folder: Path, how: str) -> None:
    path = folder / weights.MODEL_FILE
    content = bytearray(path.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
    elif how == "cut":
        content = content[:1000]
    if how == "missing":
        path.unlink()
    elif how == "card":
        (folder / weights.CARD_FILE).write_text("{")
    else:
        path.write_bytes(bytes(content))


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "card"])
def test_damaged_weights_are_one_clear_error(how: str, tmp_path: Path) -> None:
    folder = tmp_path / "weights"
    shutil.copytree(weights.FOLDER, folder)
    weights.load_scenes(folder)
    damage(folder, how)
    name = weights.CARD_FILE if how == "card" else weights.MODEL_FILE
    with pytest.raises(WeightError, match=re.escape(name)) as caught:
        weights.load_scenes(folder)
    assert "re-install" in str(caught.value) and "\n" not in str(caught.value)


def test_weights_of_another_version_are_refused(tmp_path: Path) -> None:
    weights.export(nn.Linear(2, 2), weights.MODEL_FILE, {}, tmp_path)
    with pytest.raises(WeightError, match="does not fit this version"):
        weights.load_scenes(tmp_path)
