"""Where along t does the verifier know anything? Rank correlation rho(t), within a prompt, of the posterior-mean
reward with the final reward of the same trajectory, and the spread s(t) of a child's reward around its siblings. Search
pays where rho x s is large.

    python -m bench.e2e.informativeness --prompts 24 --runs 16 --out bench/results/informativeness.json
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

import flowfast
from flowfast.models.scenes.prompts import hard_prompts


def ranks(values: torch.Tensor) -> torch.Tensor:
    """Centred ranks along the last dimension, ties broken by order."""
    order = values.argsort(-1).argsort(-1).double()
    return order - order.mean(-1, keepdim=True)


def correlation(
    flow: flowfast.types.Flow, prompts: list[str], runs: int, steps: int, seed: int
) -> list[tuple[float, float]]:
    """(linear t, rho) for each evaluation of the plain ODE; mean over prompts of Spearman's rho over runs."""
    table: dict[tuple[int, int, int], float] = {}
    times: dict[int, float] = {}

    def collect(batch: list[flowfast.Candidate]) -> None:
        for c in batch:
            table[c.prompt, c.chain, c.transition] = c.reward
            times[c.transition] = c.t

    flowfast.search(flow, prompts, method="bon", budget=runs * steps * 2, steps=steps, seed=seed, on_round=collect)
    rewards = torch.tensor([[[table[p, c, r] for c in range(runs)] for r in range(steps)] for p in range(len(prompts))])
    rank = ranks(rewards)
    last = rank[:, -1:]
    rho = (rank * last).sum(-1) / (rank.square().sum(-1) * last.square().sum(-1)).sqrt()
    return [(times[r], float(rho[:, r].mean())) for r in range(steps)]


def spread(
    flow: flowfast.types.Flow, prompts: list[str], children: int, steps: int, seed: int
) -> list[tuple[float, float]]:
    """(linear t, s): standard deviation of the rewards of the children of one parent, mean over prompts (SVDD, one
    chain)."""
    rewards: dict[int, list[list[float]]] = {}
    times: dict[int, float] = {}

    def collect(batch: list[flowfast.Candidate]) -> None:
        values_at: dict[tuple[int, int], list[float]] = {}
        for c in batch:
            values_at.setdefault((c.prompt, c.transition), []).append(c.reward)
            times[c.transition] = c.t
        for (_, transition), values in values_at.items():
            if len(values) > 1:
                rewards.setdefault(transition, []).append(values)

    budget = (1 + (steps - 1) * children) * 2
    flowfast.search(flow, prompts, method="svdd", chains=1, budget=budget, steps=steps, seed=seed, on_round=collect)
    return [
        (times[transition], float(torch.tensor([torch.tensor(v).std() for v in values]).mean()))
        for transition, values in sorted(rewards.items())
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--runs", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    flow = flowfast.load("scenes")
    prompts = hard_prompts("tuning")[: options.prompts]
    rho = correlation(flow, prompts, options.runs, options.steps, options.seed)
    sigma = spread(flow, prompts, options.runs, 10, options.seed)
    for t, value in rho:
        print(f"t {t:.2f}  rho {value:+.2f}")
    for t, value in sigma:
        print(f"t {t:.2f}  spread {value:.2f}")
    text = json.dumps(
        {"prompts": len(prompts), "runs": options.runs, "seed": options.seed, "rho": rho, "spread": sigma}, indent=1
    )
    temporary = options.out.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(options.out)


if __name__ == "__main__":
    main()
