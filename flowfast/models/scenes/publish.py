"""Ship trained weights: python -m flowfast.models.scenes.publish --checkpoint FILE --reward FILE.

Measures the averaged model and the given verifier on the tuning half of the hard prompts, writes both into the package
as float16 with a card that says how they were made and how good they are, and draws contact sheets beside the
checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import track
from safetensors.torch import load_file
from scipy.stats import rankdata, spearmanr
from torch import Tensor

from flowfast.memory import keep_memory
from flowfast.models.scenes.data import encode_prompts
from flowfast.models.scenes.heldout import heldout_score
from flowfast.models.scenes.model import SceneModel
from flowfast.models.scenes.prompts import hard_prompts
from flowfast.models.scenes.sampling import guided_velocity
from flowfast.models.scenes.train import TrainConfig, contact_sheet, evaluate, read_checkpoint
from flowfast.models.scenes.train_verifier import VerifierConfig
from flowfast.models.scenes.verifier import SceneReward
from flowfast.models.scenes.weights import MODEL_FILE, REWARD_FILE, export, load_scene_reward, load_scenes


@torch.inference_mode()
def follow(
    model: SceneModel, reward: SceneReward, prompts: list[str], repeats: int, steps: int, guidance: float
) -> tuple[Tensor, Tensor]:
    """Plain ODE runs, `repeats` a prompt: rewards (P, R, steps) of the posterior means at t = 1, 1 - 1/steps, ...
    and finished images (P, R, 3, 32, 32)."""
    generator = torch.Generator().manual_seed(4)
    rewards, ends = [], []
    for prompt in track(prompts, description="following"):
        cond = encode_prompts([prompt] * repeats)
        x_t = torch.randn((repeats, *SceneModel.shape), generator=generator)
        row = []
        for i in range(steps):
            t = torch.full((repeats,), 1.0 - i / steps)
            u_t = guided_velocity(model, x_t, t, cond["tokens"], guidance)
            row.append(reward(model.decode(x_t - t.view(-1, 1, 1, 1) * u_t), t, cond))
            x_t = x_t - u_t / steps
        rewards.append(torch.stack(row, 1))
        ends.append(model.decode(x_t))
    return torch.stack(rewards), torch.stack(ends)


def agreement(rewards: Tensor, images: Tensor, prompts: list[str]) -> dict[str, Any]:
    """How the given verifier's view (P, R, steps) of runs relates to the held-out one's of their ends (P, R, ...)."""
    p, r, steps = rewards.shape
    exact = heldout_score(images.flatten(0, 1), [q for q in prompts for _ in range(r)]).reshape(p, r)
    final = rewards[:, :, -1].numpy()
    ranks, hits = rankdata(final.ravel()), exact.ravel() > 0
    positives, negatives = int(hits.sum()), int((~hits).sum())
    area = (ranks[hits].sum() - positives * (positives + 1) / 2) / max(1, positives * negatives)
    correlation = [np.nanmean([spearmanr(row[:, k], row[:, -1])[0] for row in rewards.numpy()]) for k in range(steps)]
    return {
        "runs": f"{p} tuning prompts x {r}",
        "exact_mean": round(float(exact.mean()), 3),
        f"exact_best_of_{r}_by_reward": round(float(exact[np.arange(p), final.argmax(1)].mean()), 3),
        f"exact_best_of_{r}_possible": round(float(exact.max(1).mean()), 3),
        "reward_area_under_curve": round(float(area), 3),
        "reward_above_half_agrees": round(float(((final > np.log(0.5)) == (exact > 0)).mean()), 3),
        "reward_above_half": round(float((final > np.log(0.5)).mean()), 3),
        "exact_where_reward_above_half": round(float(exact[final > np.log(0.5)].mean()), 3),
        "rank_correlation_with_final_by_t": {
            f"{1 - k / steps:.2f}": round(float(c), 2) for k, c in enumerate(correlation)
        },
    }


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="Ship trained weights with a card.")
    parser.add_argument("--checkpoint", type=Path, required=True, help="checkpoint.safetensors of the training run")
    parser.add_argument("--reward", type=Path, required=True, help="safetensors of the given verifier")
    parser.add_argument("--note", default="", help="a line for the card on how this run differed from the defaults")
    parser.add_argument("--repeats", type=int, default=8, help="runs a prompt for the verifier's figures")
    args = parser.parse_args()
    keep_memory()
    step, saved = read_checkpoint(args.checkpoint)
    model, reward = SceneModel(), SceneReward()
    model.load_state_dict(saved["ema"])
    reward.load_state_dict(load_file(args.reward))
    base = {
        "made": "python -m flowfast.models.scenes.train",
        "seed": TrainConfig.seed,
        "steps": step,
        "note": args.note,
    }
    export(model, MODEL_FILE, base | {"samples": step * TrainConfig.batch})
    export(
        reward, REWARD_FILE, {"made": "python -m flowfast.models.scenes.train_verifier", "seed": VerifierConfig.seed}
    )
    model, reward, prompts = load_scenes(), load_scene_reward(), hard_prompts("tuning")
    accuracy = {}
    for steps in (10, 20):
        for guidance in (1.5, 2.0, 3.0):
            images, exact, soft = evaluate(model, prompts, steps, guidance)
            key = f"ode {steps} steps, guidance {guidance}"
            accuracy[key] = {"exact": round(float(exact.mean()), 3), "soft": round(float(soft.mean()), 3)}
            print(key, accuracy[key])
            contact_sheet(images[:48], prompts, exact, args.checkpoint.parent / f"final_{steps}_{guidance}.png")
    details = {"accuracy_on_tuning_half": accuracy, "samples": step * TrainConfig.batch}
    export(model, MODEL_FILE, base | details)
    figures = agreement(*follow(model, reward, prompts, args.repeats, 10, SceneModel.guidance), prompts)
    print(figures)
    export(
        reward,
        REWARD_FILE,
        {"made": "python -m flowfast.models.scenes.train_verifier", "seed": VerifierConfig.seed, "agreement": figures},
    )


if __name__ == "__main__":
    main()
