"""A robot's policy: a flow over chunks of actions, searched with a reward of the way that they make. No pictures.

    python examples/robot_policy.py 60      # NFE a decision

It knows two ways around an obstacle and proposes chunks (T, A) = (16, 2) of moves, which the reward simulates.
"""

import sys
import time

import torch

import flowfast

STEPS, SPREAD, RADIUS = 16, 0.03, 0.4
GOAL, OBSTACLE = torch.tensor([2.0, 0.0]), torch.tensor([1.0, 0.12])  # most chunks of the left way hit it


def demonstrations(start):  # (2, T, A): to the goal with an arc to the left, and with one to the right
    along, ahead = torch.linspace(0, 1, STEPS + 1)[:, None], GOAL - start
    arc = 0.3 * (torch.pi * along).sin() * torch.stack([-ahead[1], ahead[0]])
    return torch.stack([start + along * ahead + side * arc for side in (1, -1)]).diff(dim=1)


def velocity(x_t, t, cond):  # (x_t - E[x0 | x_t]) / t, for Gaussians around the demonstrations
    s, demos = t.view(-1, 1, 1, 1), cond["demos"]
    off, variance = x_t[:, None] - (1 - s) * demos, (SPREAD * (1 - s)) ** 2 + s**2
    weights = torch.softmax(-(off.square() / (2 * variance)).sum((2, 3)), 1)[..., None, None]
    x0_hat = (weights * (demos + SPREAD**2 * (1 - s) / variance * off)).sum(1)
    return (x_t - x0_hat) / s[:, 0].clamp(min=1e-3)


def main(budget):
    at = torch.zeros(2)

    def score(chunks, prompts):  # ends near the goal, and is never inside of the obstacle
        ways = at + chunks.cumsum(1)
        return -(ways[:, -1] - GOAL).norm(dim=1) - 5 * (RADIUS - (ways - OBSTACLE).norm(dim=2)).clamp(min=0).sum(1)

    flow = flowfast.flow_from(velocity, (STEPS, 2), encode=lambda texts: {"demos": demonstrations(at)[None]})
    for decision in range(4):
        began = time.perf_counter()
        result = flowfast.search(flow, "go", reward=score, method="svdd", budget=budget, steps=8, seed=decision)
        at = at + result.samples[0].latent[: STEPS // 2].sum(0)
        took = f"decided in {1000 * (time.perf_counter() - began):.0f} ms"
        print(f"reward {result.samples[0].reward:.3f}, now at ({at[0]:.2f}, {at[1]:.2f}), {took}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 60)
