"""Train the scene model: python -m flowfast.models.scenes.train --out DIR [--resume] [--steps N] [--cooldown N].

Seeded and resumable: the batch, the times and the noise of step k depend on (seed, k) only, so a resumed run goes on
as if it had never stopped. Checkpoints are written to a temporary file, synced and renamed. The learning rate is
constant and falls linearly to 0 over the last `--cooldown` steps; a run may be resumed with fewer or more steps.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from flowfast.memory import keep_memory
from flowfast.models.scenes import data
from flowfast.models.scenes.heldout import heldout_score, heldout_soft_score
from flowfast.models.scenes.model import SceneModel, to_state
from flowfast.models.scenes.prompts import hard_prompts
from flowfast.models.scenes.sampling import sample_ode


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """What a run depends on. `ema` is the decay of the averaged weights; `evaluate_every` 0 never evaluates."""

    seed: int = 0
    batch: int = 64
    steps: int = 3450
    cooldown: int = 900
    warmup: int = 100
    curriculum: int = 800
    lr_muon: float = 0.02
    lr_adam: float = 4e-3
    ema: float = 0.998
    null_share: float = 0.1
    evaluate_every: int = 500
    save_every: int = 50


class Muon(torch.optim.Optimizer):
    """Momentum, then orthogonalisation (Jordan et al. 2024), in float32; equal shapes are treated as one batch.

    torch.optim.Muon iterates in bfloat16, which has no fast matrix product on most CPUs.
    """

    def __init__(self, params: list[nn.Parameter], lr: float, momentum: float = 0.95, split: int = 0) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "split": split})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; matrices (k d, d) are treated as k matrices (d, d) where d is `split` (fused projections)."""
        for group in self.param_groups:
            shapes: dict[tuple[int, int], list[tuple[Tensor, Tensor]]] = {}
            for p in group["params"]:
                state = self.state[p]
                if "momentum" not in state:
                    state["momentum"] = torch.zeros_like(p)
                buffer = state["momentum"].lerp_(p.grad, 1 - group["momentum"])
                update = p.grad.lerp(buffer, group["momentum"])
                rows, cols = p.shape
                parts = (
                    rows // group["split"]
                    if group["split"] and rows % group["split"] == 0 and cols == group["split"]
                    else 1
                )
                for target, piece in zip(p.chunk(parts), update.chunk(parts), strict=True):
                    shapes.setdefault((piece.shape[0], piece.shape[1]), []).append((target, piece))
            for (rows, cols), pairs in shapes.items():
                flat = orthogonalise(torch.stack([piece for _, piece in pairs]))
                for (target, _), update in zip(pairs, flat, strict=True):
                    target.add_(update, alpha=-group["lr"] * max(1.0, rows / cols) ** 0.5)


def orthogonalise(x: Tensor, iterations: int = 5) -> Tensor:
    """Quintic Newton-Schulz iteration towards the orthogonal factor of each matrix of x (B, rows, cols)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = x.shape[-2] > x.shape[-1]
    y = x.transpose(-2, -1) if tall else x
    y = y / (y.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        g = y @ y.transpose(-2, -1)
        y = a * y + (b * g + c * (g @ g)) @ y
    return y.transpose(-2, -1) if tall else y


def training_batch(config: TrainConfig, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Batch of step `step`: x0, eps (B, 3, 32, 32), t (B,), tokens (B, 5, 4). Depends on (seed, step) only."""
    rng = np.random.default_rng([config.seed, step])
    ease = max(0.0, 1.0 - step / config.curriculum)
    weights = tuple(ease * e + (1 - ease) * h for e, h in zip((8, 6, 2, 0.5, 0.5), (1, 2, 4, 5, 5), strict=True))
    scenes = data.sample_batch(rng, config.batch, weights)
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    x0 = to_state(data.render(scenes))
    eps = torch.randn(x0.shape, generator=generator)
    t = torch.sigmoid(torch.randn(config.batch, generator=generator) + 0.3)
    uniform = torch.rand(config.batch, generator=generator)
    t = torch.where(torch.rand(config.batch, generator=generator) < 0.2, uniform, t)
    keep = torch.rand(config.batch, generator=generator) >= config.null_share
    return x0, eps, t, scenes.tokens * keep[:, None, None]


def evaluate(
    model: SceneModel, prompts: list[str], steps: int, guidance: float, seed: int = 0
) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Images (N, 3, 32, 32), exactness and soft score (N,) of plain ODE samples, one a prompt."""
    tokens = data.encode_prompts(prompts)["tokens"]
    noise = torch.randn((len(prompts), *SceneModel.shape), generator=torch.Generator().manual_seed(seed))
    with torch.inference_mode():
        parts = [
            sample_ode(model, n, c, steps, guidance) for n, c in zip(noise.split(32), tokens.split(32), strict=True)
        ]
        images = model.decode(torch.cat(parts))
    return images, heldout_score(images, prompts), heldout_soft_score(images, prompts)


def contact_sheet(images: Tensor, prompts: list[str], scores: np.ndarray, path: Path) -> None:
    """Write the images (N, 3, 32, 32) with their prompts as one PNG; right ones have a green title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = 8
    rows = -(-len(images) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 2.1, rows * 2.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, image, prompt, score in zip(axes.flat, images, prompts, scores, strict=False):
        axis.imshow(image.permute(1, 2, 0).numpy())
        axis.set_title(
            prompt.replace(" and ", "\nand ").replace(", ", ",\n"), fontsize=7, color="green" if score else "firebrick"
        )
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)


def save_checkpoint(path: Path, step: int, model: nn.Module, average: nn.Module, optimisers: Sequence[Any]) -> None:
    """Weights, averaged weights and the optimisers' states after `step` steps, as safetensors: a temporary file beside
    `path`, fsync, rename, so that `path` is always whole."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"ema.{name}": value for name, value in average.state_dict().items()}
    for i, optimiser in enumerate(optimisers):
        for p, state in optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser{i}.{p}.{name}": value for name, value in state.items()}
    content = save({name: value.contiguous() for name, value in tensors.items()}, metadata={"step": str(step)})
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_checkpoint(path: Path) -> tuple[int, dict[str, dict[str, Tensor]]]:
    """Steps done, and the tensors by part: "model", "ema", "optimiser0", "optimiser1"."""
    parts: dict[str, dict[str, Tensor]] = {}
    with safe_open(path, "pt") as file:
        for name in file.keys():  # noqa: SIM118  (not a dict)
            part, _, rest = name.partition(".")
            parts.setdefault(part, {})[rest] = file.get_tensor(name)
        return int(file.metadata()["step"]), parts


def restore(optimiser: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Puts the state that `save_checkpoint` wrote back into an optimiser; its settings stay."""
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        p, _, key = name.partition(".")
        state.setdefault(int(p), {})[key] = value
    optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})


def train(config: TrainConfig, out: Path, resume: bool) -> None:
    """Run or go on; leaves checkpoint.safetensors, log.txt and sheet_*.png in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    console = Console()
    torch.manual_seed(config.seed)  # initial weights only
    model, average = SceneModel(), SceneModel()
    average.load_state_dict(model.state_dict())
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    optimisers = [
        Muon(matrices, lr=config.lr_muon, split=model.dim),
        torch.optim.AdamW(others, lr=config.lr_adam, betas=(0.9, 0.99), weight_decay=0.0),
    ]
    rates = (config.lr_muon, config.lr_adam)
    checkpoint, start = out / "checkpoint.safetensors", 0
    if resume and checkpoint.exists():
        start, saved = read_checkpoint(checkpoint)
        model.load_state_dict(saved["model"])
        average.load_state_dict(saved["ema"])
        for i, optimiser in enumerate(optimisers):
            restore(optimiser, saved[f"optimiser{i}"])
    prompts, losses, last = hard_prompts("tuning")[:64], [], time.perf_counter()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress, open(out / "log.txt", "a", encoding="utf-8") as log:
        task = progress.add_task("training", total=config.steps, completed=start)
        for step in range(start, config.steps):
            share = min(1.0, (step + 1) / config.warmup, (config.steps - step) / max(1, config.cooldown))
            for optimiser, rate in zip(optimisers, rates, strict=True):
                for group in optimiser.param_groups:
                    group["lr"] = rate * share
            x0, eps, t, tokens = training_batch(config, step)
            time_ = t.view(-1, 1, 1, 1)
            u_t = model((1 - time_) * x0 + time_ * eps, t, {"tokens": tokens})
            loss = (u_t - (eps - x0)).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(others, 1.0)
            for optimiser in optimisers:
                optimiser.step()
                optimiser.zero_grad(set_to_none=True)
            decay = min(config.ema, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
            losses.append(float(loss.detach()))
            done = step + 1
            progress.update(task, completed=done, description=f"loss {np.mean(losses[-100:]):.4f}")
            if done % config.save_every == 0 or done == config.steps:
                save_checkpoint(checkpoint, done, model, average, optimisers)
                now = time.perf_counter()
                log.write(f"step {done} loss {np.mean(losses[-config.save_every :]):.4f} seconds {now - last:.1f}\n")
                log.flush()
                last = now
            if config.evaluate_every and (done % config.evaluate_every == 0 or done == config.steps):
                images, exact, soft = evaluate(average, prompts, steps=20, guidance=3.0)
                line = f"step {done} ODE 20 steps, guidance 3: exact {exact.mean():.3f} soft {soft.mean():.3f}"
                console.print(line)
                log.write(line + "\n")
                log.flush()
                contact_sheet(images[:48], prompts, exact, out / f"sheet_{done:06d}.png")
                last = time.perf_counter()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the scene model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints, log and contact sheets")
    parser.add_argument("--resume", action="store_true", help="go on from the folder's checkpoint")
    parser.add_argument("--steps", type=int, default=TrainConfig.steps)
    parser.add_argument("--cooldown", type=int, default=TrainConfig.cooldown)
    parser.add_argument("--batch", type=int, default=TrainConfig.batch)
    parser.add_argument("--seed", type=int, default=TrainConfig.seed)
    args = parser.parse_args()
    keep_memory()
    config = TrainConfig(steps=args.steps, cooldown=args.cooldown, batch=args.batch, seed=args.seed)
    train(config, args.out, args.resume)


if __name__ == "__main__":
    main()
