"""What does the reward's gradient buy on the embedded model, at equal NFE and at equal seconds? Given reward, share
exactly right by the held-out verifier, CPU seconds a prompt on one thread (so that other load on the machine hardly
counts).

    python -m bench.e2e.steered --prompts 16 --seeds 2 --out bench/results/steered.jsonl
    python -m bench.e2e.steered --split heldout --only rbf --prompts 40 --seeds 1 --out bench/results/steered.jsonl

One line an arm and seed goes to --out, and what stands there already is skipped. Arms take turns within a seed.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

import flowfast
from flowfast.memory import keep_memory
from flowfast.models.scenes.heldout import heldout_score
from flowfast.models.scenes.prompts import hard_prompts

ARMS: list[tuple[str, str | None, int]] = [
    *(("rbf", None, budget) for budget in (100, 200, 400)),
    *(("rbf", f"dps:{strength}", 100) for strength in (0.1, 0.3, 1, 3)),
    *(("svdd", gradient, 100) for gradient in (None, "dps:1")),
    *(("bon", gradient, 100) for gradient in (None, "dps:1")),
    *(("ode", gradient, 20) for gradient in (None, "dps:1")),
]
"""Method, gradient, budget in NFE."""


def run(arm: tuple[str, str | None, int], prompts: list[str], seed: int, micro_batch: int) -> dict[str, Any]:
    method, gradient, budget = arm
    flow, started = flowfast.load("scenes"), time.process_time()
    result = flowfast.search(
        flow, prompts, reward="scenes", method=method, gradient=gradient, budget=budget, seed=seed,
        micro_batch=micro_batch,
    )  # fmt: skip
    seconds = time.process_time() - started
    images = torch.stack([sample.image for sample in result.samples])
    return {
        "reward": [sample.reward for sample in result.samples],
        "heldout": heldout_score(images, prompts).tolist(),
        "nfe": sum(sample.nfe for sample in result.samples) / len(prompts),
        "cpu_seconds": seconds / len(prompts),
    }


def table(rows: list[dict[str, Any]]) -> None:
    """Means over prompts and seeds, with standard errors over prompts."""
    for arm in dict.fromkeys(tuple(row["arm"]) for row in rows):
        own = [row for row in rows if tuple(row["arm"]) == arm]
        reward, exact = (torch.tensor([row[name] for row in own]).double().mean(0) for name in ("reward", "heldout"))
        error = [float(values.std() / len(values) ** 0.5) for values in (reward, exact)]
        print(
            f"{arm[0]:5s} {arm[1] or '':8s} {own[0]['nfe']:4.0f} NFE  "
            f"{min(row['cpu_seconds'] for row in own):.2f} s  given {float(reward.mean()):+.2f} +- {error[0]:.2f}  "
            f"held-out {float(exact.mean()):.3f} +- {error[1]:.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--split", choices=("tuning", "heldout"), default="tuning", help="half of the hard prompts")
    parser.add_argument("--only", default="", help="arms of this method")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    keep_memory()
    torch.set_num_threads(1)
    prompts = hard_prompts(options.split)[: options.prompts]
    arms = [arm for arm in ARMS if options.only in ("", arm[0])]
    setting = {"split": options.split, "prompts": len(prompts)}
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    rows = [row for row in rows if {name: row[name] for name in setting} == setting]
    done = {(tuple(row["arm"]), row["seed"]) for row in rows}
    for seed in range(options.seeds):
        for k in range(len(arms)):
            arm = arms[(k + seed) % len(arms)]
            if (arm, seed) not in done:
                found = run(arm, prompts, seed, options.micro_batch)
                rows.append({"arm": arm, "seed": seed, **setting, **found})
                with options.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    table([row for row in rows if tuple(row["arm"]) in arms and row["seed"] < options.seeds])


if __name__ == "__main__":
    main()
