"""Which path, noise and grid make search pay on the embedded model? Runs named arms on the *tuning* half only and
prints a table.

    python -m bench.e2e.tune_scenes --prompts 48 --budget 200 --seeds 1 --out bench/results/tuning.jsonl

One line a finished arm goes to --out; arms that stand there already are skipped, so the run can be stopped and taken
up again.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch

import flowfast
from flowfast.models.scenes.heldout import heldout_score
from flowfast.models.scenes.prompts import hard_prompts

PAPER = {"preset": "paper"}
CPS = {"integrator": "coefficient-preserving:0.5"}
ARMS: dict[str, dict[str, Any]] = {
    "ode": {"method": "ode"},
    "bon": {"method": "bon"},
    "svdd paper vp": {"method": "svdd", **PAPER},
    "svdd paper linear": {"method": "svdd", "preset": "paper-linear"},
    "rbf paper vp": {"method": "rbf", **PAPER},
    "rbf paper linear": {"method": "rbf", "preset": "paper-linear"},
    "rbf-official vp": {"method": "rbf-official", **PAPER, "tail": 0},
}
for method in ("svdd", "rbf", "smc", "code"):
    for name, path in {
        "uniform cps.5": {"grid": "uniform", **CPS},
        "uniform cps.7": {"grid": "uniform", "integrator": "coefficient-preserving:0.7"},
        "uniform cps1": {"grid": "uniform", "integrator": "coefficient-preserving:1"},
        "window.8:.2 cps.5": {"grid": "window:0.8:0.2", **CPS},
        "window.8:.2 cps1": {"grid": "window:0.8:0.2", "integrator": "coefficient-preserving:1"},
        "window.7:.3 cps.7": {"grid": "window:0.7:0.3", "integrator": "coefficient-preserving:0.7"},
        "linear em square3": {"grid": "uniform", "integrator": "euler-maruyama", "diffusion": "square:3"},
        "vp-linear-grid em": {
            "interpolant": "vp",
            "grid": "linear",
            "integrator": "euler-maruyama",
            "diffusion": "square:3",
        },
        "vp-linear-grid exp": {
            "interpolant": "vp",
            "grid": "linear",
            "integrator": "exponential",
            "diffusion": "square:3",
        },
        "linear em square2": {"grid": "uniform", "integrator": "euler-maruyama", "diffusion": "square:2"},
        "linear em square4": {"grid": "uniform", "integrator": "euler-maruyama", "diffusion": "square:4"},
        "linear em sigma2": {"grid": "uniform", "integrator": "euler-maruyama", "diffusion": "sigma:2"},
        "linear exp square4": {"grid": "uniform", "integrator": "exponential", "diffusion": "square:4"},
        "flow-grpo": {"grid": "uniform", "integrator": "flow-grpo:0.7"},
        "vp-linear-grid exp square4": {
            "interpolant": "vp",
            "grid": "linear",
            "integrator": "exponential",
            "diffusion": "square:4",
        },
        "window.8:.1 cps.7": {"grid": "window:0.8:0.1:2", "integrator": "coefficient-preserving:0.7"},
    }.items():
        ARMS[f"{method} {name}"] = {"method": method, **path}

for margin in (0.5, 1.0, 2.0, 4.0):
    for path in ("linear", "vp"):
        name = f"rollover margin {margin:g} {path}"
        ARMS[name] = {"method": "rbf", "interpolant": path, "method_options": {"margin": margin}}
for method in ("bon", "svdd", "code", "smc", "rbf"):
    ARMS[f"default {method} vp"] = {"method": method, "interpolant": "vp"}
    ARMS[f"default {method} linear"] = {"method": method}


def run(arm: dict[str, Any], prompts: list[str], budget: int, seeds: int, micro_batch: int) -> dict[str, Any]:
    """Mean given reward, held-out share exact with its standard error over prompts, NFE and seconds a prompt."""
    flow = flowfast.load("scenes")
    reward, exact, nfe, started = 0.0, torch.zeros(len(prompts)), 0, time.perf_counter()
    for seed in range(seeds):
        options = {"steps": 10, **arm, "budget": 20 if arm["method"] == "ode" else budget}
        result = flowfast.search(flow, prompts, reward="scenes", seed=seed, micro_batch=micro_batch, **options)
        reward += sum(s.reward for s in result.samples) / len(prompts) / seeds
        nfe += sum(s.nfe for s in result.samples)
        images = torch.stack([s.image for s in result.samples])
        exact += torch.as_tensor(heldout_score(images, prompts)).float() / seeds
    return {
        "reward": reward,
        "heldout": float(exact.mean()),
        "heldout_se": float(exact.std() / len(prompts) ** 0.5),
        "nfe": nfe / seeds / len(prompts),
        "seconds": (time.perf_counter() - started) / seeds / len(prompts),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--budget", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--only", default="", help="arms whose name contains this text")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    prompts = hard_prompts("tuning")[: options.prompts]
    setting = {"prompts": len(prompts), "budget": options.budget, "seeds": options.seeds}
    rows = [json.loads(line) for line in options.out.read_text().splitlines()] if options.out.exists() else []
    done = {row["arm"] for row in rows if {k: row[k] for k in setting} == setting}
    for name, arm in ARMS.items():
        if name in done or options.only not in name:
            continue
        row = {
            "arm": name,
            **setting,
            **run(arm, prompts, options.budget, options.seeds, options.micro_batch),
            "options": arm,
        }
        with options.out.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        exact = f"{row['heldout']:.3f} +- {row['heldout_se']:.3f}"
        print(f"{name:28s} exact {exact}  reward {row['reward']:+.3f}  nfe {row['nfe']:.0f}  {row['seconds']:.2f} s")


if __name__ == "__main__":
    main()
