"""An own model: a small network that learns points on a spiral in seconds, then a search over its samples.

    python examples/own_model.py 120      # NFE a prompt

A flow is a function velocity(x_t, t, cond) -> dx/dt with t = 1 noise and t = 0 data. There is no picture here: the
latents (N, 2) themselves are what the reward sees.
"""

import sys

import torch
from torch import nn

import flowfast


def spiral(count):
    turn = 3 * torch.pi * torch.rand(count).sqrt()
    return torch.stack([turn.cos(), turn.sin()], 1) * turn[:, None] / 5


def trained(steps=300):
    network = nn.Sequential(nn.Linear(3, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 2))
    optimizer = torch.optim.Adam(network.parameters(), 3e-3)
    for _ in range(steps):
        x0, noise, t = spiral(256), torch.randn(256, 2), torch.rand(256, 1)
        x_t = (1 - t) * x0 + t * noise  # the linear path, whose velocity is noise - x0
        loss = (network(torch.cat([x_t, t], 1)) - (noise - x0)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def main(budget):
    torch.manual_seed(0)
    network = trained()
    flow = flowfast.flow_from(lambda x_t, t, cond: network(torch.cat([x_t, t[:, None]], 1)), shape=(2,))
    goals = {"north": torch.tensor([0.0, 1.5]), "west": torch.tensor([-1.8, 0.0])}

    def score(points, prompts):  # (N, 2) -> N numbers, higher is better
        return [-float((point - goals[prompt]).norm()) for point, prompt in zip(points, prompts, strict=True)]

    for method in ("ode", "bon", "svdd"):
        result = flowfast.search(flow, list(goals), reward=score, method=method, budget=budget, seed=0, steps=12)
        print(method, *(f"{s.prompt}: {-s.reward:.3f} away at {s.nfe} NFE" for s in result.samples), sep="   ")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 120)
