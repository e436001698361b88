"""Train the given verifier: python -m flowfast.models.scenes.train_verifier --model FILE --out DIR.

Two phases, both seeded. First the ensemble learns finished scenes from the renderer, with malformed ones (faded,
doubled, merged, cut, out of size) as negatives. Then it labels the ends of the model's own trajectories, and a copy
goes on to learn those labels from the posterior means along the way, with the time as input: what a trajectory will
become, judged from what it looks like now. The held-out verifier takes no part in this.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from safetensors.torch import load_file, save_file
from torch import Tensor

from flowfast.memory import keep_memory
from flowfast.models.scenes import data, grammar
from flowfast.models.scenes.model import SceneModel
from flowfast.models.scenes.sampling import guided_velocity
from flowfast.models.scenes.verifier import SceneReward


@dataclass(frozen=True, kw_only=True)
class VerifierConfig:
    """What a run depends on."""

    seed: int = 1
    batch: int = 128
    steps_rendered: int = 2500
    trajectories: int = 4096
    steps_posterior: int = 2000
    lr: float = 3e-3
    guidance: tuple[float, ...] = (2.0, 3.0)


@dataclass
class Labels:
    """What N images show: counts (N, 16, 7) probabilities, weight (N, 16) 0 where unknown, formed (N,), relation (N,)
    with -1 where unknown."""

    counts: Tensor
    weight: Tensor
    formed: Tensor
    relation: Tensor


def spoil(rng: np.random.Generator, scenes: data.SceneBatch) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) with one object of each scene spoiled, and a mask (N, 16) of the classes concerned."""
    n = scenes.tokens.shape[0]
    row, slot = torch.nonzero(scenes.tokens[:, :, 0] > 0, as_tuple=True)
    cls, centres, radii = (
        scenes.tokens[row, slot, 0] - 1,
        scenes.centres[row, slot].clone(),
        scenes.radii[row, slot].clone(),
    )
    opacity = torch.ones(len(row), data.WINDOW, data.WINDOW)
    count = torch.bincount(row, minlength=n)
    first = torch.cumsum(count, 0) - count
    victim = first + torch.from_numpy(rng.integers(0, 2**30, n)) % count
    how = torch.from_numpy(rng.integers(0, 5, n))
    u, angle = (
        torch.from_numpy(rng.random(n).astype(np.float32)),
        torch.from_numpy(rng.random(n).astype(np.float32)) * 2 * math.pi,
    )
    heading = torch.stack((angle.cos(), angle.sin()), 1)
    other = torch.from_numpy(rng.integers(0, data.NUM_CLASSES - 1, n))
    other = other + (other >= cls[victim]).long()
    touched = F.one_hot(cls[victim], data.NUM_CLASSES).bool()

    opacity[victim[how == 0]] = 0.2 + 0.5 * u[how == 0][:, None, None]  # faded
    doubled = how == 1  # two classes in one place
    opacity[victim[doubled]] = 0.3 + 0.4 * u[doubled][:, None, None]
    size = how == 2
    radii[victim[size]] = torch.where(u[size] < 0.6, 1.5 + 1.8 * u[size], 5.3 + 2.0 * (u[size] - 0.6))
    cut = how == 3  # a part is missing: what lies beyond a line through the object
    grid = torch.arange(data.WINDOW) - data.WINDOW // 2 + 1.0
    along = grid[None, None, :] * heading[cut, 0, None, None] + grid[None, :, None] * heading[cut, 1, None, None]
    opacity[victim[cut]] = (1.5 - 2.5 * u[cut][:, None, None] - along).clamp(0.0, 1.0)
    merged = how == 4  # a second object, half of the time of the same class, runs into it
    extra = doubled | merged
    extra_cls = torch.where(merged & (u < 0.5), cls[victim], other)[extra]
    shift = torch.where(merged[:, None], heading * (2.5 + 4.0 * u[:, None]), 0.0)[extra]
    extra_opacity = torch.where(doubled, 0.7 - 0.4 * u, 1.0)[extra][:, None, None].expand(-1, data.WINDOW, data.WINDOW)
    touched[extra] |= F.one_hot(extra_cls, data.NUM_CLASSES).bool()
    images = data.draw(
        n,
        torch.cat((row, torch.nonzero(extra)[:, 0])),
        torch.cat((cls, extra_cls)),
        torch.cat((centres, centres[victim[extra]] + shift)),
        torch.cat((radii, radii[victim[extra]])),
        torch.cat((opacity, extra_opacity)),
    )
    return images, touched


def crowd(rng: np.random.Generator, n: int) -> data.SceneBatch:
    """n layouts of 0-8 objects of 1-3 classes and now and then a stray one: models draw too many as well as too few.

    Slots (n, 9) carry the class only.
    """
    slots = data.GRID**2
    total = rng.choice(slots, n, p=np.array((0.3, 1, 2, 4, 5, 5, 3, 1.5, 0.7)) / 22.5)
    menu = np.argsort(rng.random((n, data.NUM_CLASSES)), axis=1)[:, :4]
    pick = np.minimum(rng.integers(0, 3, (n, slots)), rng.integers(0, 3, (n, 1)))
    pick = np.where(rng.random((n, slots)) < 0.05, 3, pick)
    tokens = np.zeros((n, slots, grammar.NUM_FEATURES), np.int64)
    tokens[:, :, 0] = np.where(np.arange(slots) < total[:, None], 1 + np.take_along_axis(menu, pick, 1), 0)
    cells = np.argsort(rng.random((n, slots)), axis=1)
    radii = rng.uniform(*data.RADIUS, (n, slots))
    jitter = rng.uniform(-1.0, 1.0, (n, slots, 2)) * (data.REACH - radii)[..., None]
    centres = (np.stack((cells % data.GRID, cells // data.GRID), -1) + 0.5) * (data.SIZE / data.GRID) + jitter
    return data.SceneBatch(
        *(torch.from_numpy(a) for a in (tokens, centres.astype(np.float32), radii.astype(np.float32)))
    )


def rendered_batch(rng: np.random.Generator, n: int) -> tuple[Tensor, Tensor, Labels]:
    """Images (n, 3, 32, 32), tokens (n, 5, 4) that ask about a relation, labels; a third spoiled, all a bit dirty."""
    scenes = crowd(rng, n)
    formed, weight = torch.ones(n), torch.ones(n, data.NUM_CLASSES)
    bad = n // 3
    scenes.tokens[:bad, 0, 0] = scenes.tokens[:bad, 0, 0].clamp(min=1)  # what is spoiled has an object
    part = data.SceneBatch(scenes.tokens[:bad], scenes.centres[:bad], scenes.radii[:bad])
    images = data.render(scenes)
    images[:bad], touched = spoil(rng, part)
    formed[:bad], weight[:bad] = 0.0, (~touched).float()

    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    blur = torch.rand(n, 1, 1, 1, generator=generator) * (torch.rand(n, 1, 1, 1, generator=generator) < 0.5) * 0.5
    smooth = F.avg_pool2d(F.pad(images, (1, 1, 1, 1), mode="replicate"), 3, 1)
    level = torch.randn(n, 1, 1, 1, generator=generator).abs() * 0.04
    tint = torch.randn(n, 3, 1, 1, generator=generator) * 0.01
    images = (torch.lerp(images, smooth, blur) + level * torch.randn(images.shape, generator=generator) + tint).clamp(
        0.0, 1.0
    )

    tokens, relation = (
        torch.zeros(n, grammar.NUM_TOKENS, grammar.NUM_FEATURES, dtype=torch.long),
        torch.full((n,), -1.0),
    )
    classes, centres = scenes.tokens[:, :, 0].numpy(), scenes.centres.numpy()
    for i in range(bad, n):
        single = [k for k, c in enumerate(classes[i]) if c > 0 and (classes[i] == c).sum() == 1]
        if len(single) < 2:
            continue
        a, b = (int(k) for k in rng.choice(single, 2, replace=False))
        axis = int(rng.integers(2))
        tokens[i, 0, 0], tokens[i, 0, 3] = int(classes[i, a]), 1 + 2 * axis
        tokens[i, 1, 0], tokens[i, 1, 3] = int(classes[i, b]), 2 + 2 * axis
        relation[i] = float(centres[i, b, axis] - centres[i, a, axis] >= 4.0)
    counts = scenes.counts().clamp(max=data.MAX_OBJECTS + 1)
    return images, tokens, Labels(F.one_hot(counts, data.MAX_OBJECTS + 2).float(), weight, formed, relation)


def ensemble_loss(
    reward: SceneReward, images: Tensor, t: Tensor, tokens: Tensor, labels: Labels, keep: Tensor
) -> Tensor:
    """Cross-entropy of all heads; `keep` (E, N) weighs each row for each member, so that members differ."""
    counts, formed, relation = reward.logits(images, t, tokens)
    row = -(torch.log_softmax(counts, 3) * labels.counts).sum(3) * labels.weight
    known = (labels.relation >= 0).float()
    total = (
        row.sum(2)
        + F.binary_cross_entropy_with_logits(formed, labels.formed.expand_as(formed), reduction="none")
        + F.binary_cross_entropy_with_logits(
            relation, labels.relation.clamp(min=0).expand_as(relation), reduction="none"
        )
        * known
    )
    return (total * keep).sum() / keep.sum()


@torch.inference_mode()
def trajectories(model: SceneModel, config: VerifierConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Runs: posterior means (R, S, 3, 32, 32) float16 in [0, 1], times (R, S), ends (R, 3, 32, 32), tokens (R, 5, 4).

    Each batch of 32 has its own number of steps (8-14), offset, guidance and share of fresh noise (a coefficient-
    preserving step with k = cos(eta pi / 2), eta in {0, 0.4, 0.8}), as a search would have.
    """
    rng = np.random.default_rng([config.seed, 77])
    generator = torch.Generator().manual_seed(config.seed + 77)
    kept: tuple[list[Tensor], ...] = ([], [], [], [])
    slots = 8  # posterior means kept of each run
    for _ in track(range(config.trajectories // 32), description="trajectories"):
        tokens = data.lay_out(
            rng, [data.sample_scene(rng, int(k)) for k in rng.choice(5, 32, p=np.array((1, 2, 4, 5, 5)) / 17) + 1]
        ).tokens
        steps, eta = int(rng.integers(8, 15)), float(rng.choice((0.0, 0.4, 0.8)))
        guidance, shift = float(rng.choice(config.guidance)), float(rng.uniform(-0.4, 0.4))
        grid = [1.0, *(1.0 - (i + shift) / steps for i in range(1, steps)), 0.0]
        x_t = torch.randn((32, *SceneModel.shape), generator=generator)
        means, times = [], []
        for now, after in zip(grid[:-1], grid[1:], strict=True):
            u_t = guided_velocity(model, x_t, torch.full((32,), now), tokens, guidance)
            x0_hat, eps_hat = x_t - now * u_t, x_t + (1 - now) * u_t
            means.append(model.decode(x0_hat).half())
            times.append(now)
            k = math.cos(eta * math.pi / 2)
            x_t = (1 - after) * x0_hat + after * (
                k * eps_hat + math.sqrt(1 - k * k) * torch.randn(x_t.shape, generator=generator)
            )
        pick = np.sort(rng.choice(len(means), slots, replace=False))
        kept[0].append(torch.stack([means[i] for i in pick], 1))
        kept[1].append(torch.tensor([times[i] for i in pick])[None].expand(32, -1))
        kept[2].append(means[-1].float())
        kept[3].append(tokens)
    return torch.cat(kept[0]), torch.cat(kept[1]), torch.cat(kept[2]), torch.cat(kept[3])


@torch.inference_mode()
def label(teacher: SceneReward, ends: Tensor, tokens: Tensor) -> Labels:
    """The ensemble's own opinion of finished images, as soft labels."""
    parts = []
    for images, asked in zip(ends.split(256), tokens.split(256), strict=True):
        counts, formed, relation = teacher.logits(images, torch.zeros(len(images)), asked)
        has = (asked[:, :, 3] > 0).any(1)
        parts.append(
            (counts.softmax(3).mean(0), formed.sigmoid().mean(0), torch.where(has, relation.sigmoid().mean(0), -1.0))
        )
    counts, formed, relation = (torch.cat(p) for p in zip(*parts, strict=True))
    return Labels(counts, torch.ones(counts.shape[:2]), formed, relation)


def fit(
    reward: SceneReward,
    steps: int,
    config: VerifierConfig,
    phase: int,
    runs: tuple[Tensor, Tensor, Tensor, Labels] | None,
) -> float:
    """One phase of training; with `runs` (means, times, tokens, labels) half of each batch is posterior means."""
    optimiser = torch.optim.AdamW(reward.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, config.lr, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    for step in track(range(steps), description=f"phase {phase}"):
        rng = np.random.default_rng([config.seed, phase, step])
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        half = config.batch if runs is None else config.batch // 2
        images, tokens, labels = rendered_batch(rng, half)
        t = torch.rand(half, generator=generator) * 0.1
        if runs is not None:
            means, times, asked, target = runs
            pick = torch.from_numpy(rng.integers(0, len(means), config.batch))
            slot = torch.from_numpy(rng.integers(0, means.shape[1], config.batch))
            images, t = torch.cat((images, means[pick, slot].float())), torch.cat((t, times[pick, slot]))
            tokens = torch.cat((tokens, asked[pick]))
            names = ("counts", "weight", "formed", "relation")
            labels = Labels(*(torch.cat((getattr(labels, k), getattr(target, k)[pick])) for k in names))
        keep = (torch.rand(len(reward.members), len(images), generator=generator) < 0.7).float()
        loss = ensemble_loss(reward, images, t, tokens, labels, keep)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(reward.parameters(), 5.0)
        optimiser.step()
        schedule.step()
        losses.append(float(loss.detach()))
    return float(np.mean(losses[-100:]))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the given verifier of the scene model.")
    parser.add_argument("--model", type=Path, help="safetensors of the scene model; needed for the second phase")
    parser.add_argument("--first", type=Path, help="safetensors of a finished first phase, to go on from")
    parser.add_argument("--out", type=Path, required=True, help="folder for the two safetensors files")
    args = parser.parse_args()
    keep_memory()
    config = VerifierConfig()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(config.seed)  # initial weights only
    reward = SceneReward()
    if args.first:
        reward.load_state_dict(load_file(args.first))
    else:
        print(f"phase 1 loss {fit(reward, config.steps_rendered, config, 1, None):.4f}")
        save_file(reward.state_dict(), args.out / "rendered.safetensors")
    if args.model:
        model = SceneModel()
        model.load_state_dict({k: v.float() for k, v in load_file(args.model).items()})
        teacher = copy.deepcopy(reward).eval()
        means, times, ends, tokens = trajectories(model.eval(), config)
        labels = label(teacher, ends, tokens)
        print(f"phase 2 loss {fit(reward, config.steps_posterior, config, 2, (means, times, tokens, labels)):.4f}")
        save_file(reward.state_dict(), args.out / "reward.safetensors")


if __name__ == "__main__":
    main()
