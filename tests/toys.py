"""Small flows and rewards for tests of whole searches: closed form, scriptable, and counting every row they see."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flowfast.config import make_config
from flowfast.flow import ScheduleSpec
from flowfast.flow.schedule import Schedule
from flowfast.methods.plan import Plan
from flowfast.ops.noise import noise_key
from flowfast.resolve import resolve
from flowfast.rounds.batch import Limits

CPU = torch.device("cpu")
SPEC = ScheduleSpec(steps=6, integrator="coefficient-preserving:0.5")
PROMPTS = ["a", "bb", "ccc", "dddd"]
METHODS = ["bon", "ode", "prune", "sop", "smc", "code", "svdd", "rbf", "rbf-official"]


@pytest.fixture(autouse=True)
def no_grad() -> Iterator[None]:
    """Without gradients, for the tests that import it."""
    with torch.no_grad():
        yield


class GaussianFlow(nn.Module):
    """Linear-path velocity of x0 ~ N(cond mean, s^2 I): u = E[eps - x0 | x_t], exact. `seen` counts its rows."""

    seen: Tensor

    def __init__(self, shape: tuple[int, ...] = (3,), spread: float = 0.5):
        super().__init__()
        self.shape, self.spread = shape, spread
        self.interpolant, self.t_finish, self.guidance = "linear", 0.1, 1.0
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"mean": torch.tensor([[float(len(prompt) % 5) / 5] for prompt in prompts])}

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        self.seen.add_(x_t.size(0))
        n = x_t.size(0)
        x, tt, mean = x_t.flatten(1), t.view(n, 1), cond["mean"]
        a, var = 1 - tt, self.spread * self.spread
        total = a * a * var + tt * tt
        centred = x - a * mean
        x0 = mean + a * var / total * centred
        eps = tt / total * centred
        return (eps - x0).view(x_t.shape)

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        return x0


class NearTarget(nn.Module):
    """Reward -|x0 - target|^2, target from the prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.name, self.range, self.differentiable = "near-target", (-1e9, 0.0), True

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"target": torch.tensor([[1.0 + len(prompt) % 3] for prompt in prompts])}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return -(images.flatten(1) - cond["target"]).square().sum(1)


SPACING = 16.0  # normals stay below 6, so the nearest multiple is the parent's number


class TernaryFlow(nn.Module):
    """A tree: the state is the number c of a node, root 0; the noise of a transition picks a child 3c + 1, 2 or 3.

    With the rows of `ternary_schedule` x' = SPACING * parent + z; the velocity is the child's number, and so is x0_hat.
    """

    cuts: Tensor

    def __init__(self, chances: tuple[float, float, float] = (0.5, 0.3, 0.2)):
        super().__init__()
        self.shape = (1,)
        self.interpolant, self.t_finish, self.guidance = "linear", 0.1, 1.0
        self.chances = chances
        cuts = torch.special.ndtri(torch.tensor([chances[0], chances[0] + chances[1]], dtype=torch.float64))
        self.register_buffer("cuts", cuts.float())

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(len(prompts), 1)}

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        parent = torch.round(x_t / SPACING)
        z = x_t - SPACING * parent
        return 3 * parent + 1 + (z > self.cuts[0]).to(x_t.dtype) + (z > self.cuts[1]).to(x_t.dtype)

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        return x0


class NodeReward(nn.Module):
    """A number for each node of the tree, all different."""

    values: Tensor

    def __init__(self, depth: int, seed: int = 0):
        super().__init__()
        self.name, self.range, self.differentiable = "node", (0.0, 1.0), False
        nodes = (3 ** (depth + 1) - 1) // 2
        order = torch.randperm(nodes, generator=torch.Generator().manual_seed(seed))
        self.register_buffer("values", order.float() / nodes)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(len(prompts), 1)}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.values[images.flatten().round().to(torch.int64).clamp(0, self.values.size(0) - 1)]


def ternary_schedule(noisy: list[bool]) -> Schedule:
    """Row k picks a child by noise, or (C = 0) takes the child of z = 0. Row 0 starts at the root, the last one is
    finished."""
    rows = len(noisy)
    table = torch.zeros(rows, 8, dtype=torch.float64)
    table[1:, 1], table[:, 2], table[:, 5], table[1:, 7] = SPACING, torch.tensor(noisy).double(), 1.0, 1.0
    time = torch.linspace(1.0, 0.1, rows, dtype=torch.float64)
    return Schedule(
        table=table,
        time=time,
        time_from=torch.cat([time[:1], time[:-1]]),
        linear_time=time,
        searchable=torch.tensor(noisy),
        finished=torch.arange(rows) == rows - 1,
    )


@dataclass
class Bench:
    """A search driven by hand, slot by slot."""

    engine: Any
    plan: Plan
    schedule: Schedule
    flow: Any
    reward: Any
    guidance: float
    device: torch.device

    def admit(
        self, slot: int, prompt: str, seed: int = 0, latents: Tensor | None = None, until: float = math.inf
    ) -> None:
        plan, device = self.plan, self.device
        forecast = plan.forecast()
        self.engine.admit(
            slot,
            on(self.flow.encode([prompt]), device),
            on(self.flow.encode([""]), device),
            on(self.reward.encode([prompt]), device),
            noise_key(seed, prompt),
            Limits(
                torch.tensor(plan.quota, device=device),
                torch.tensor(plan.left, device=device),
                torch.tensor(plan.start or [True] * plan.chains, device=device),
                forecast.widths,
                forecast.scored,
                forecast.null,
            ),
            self.guidance,
            until,
            latents,
        )

    def round(self) -> None:
        self.engine.observe(self.engine.score(self.engine.propose()))

    def run(self) -> int:
        """To the end of every slot; returns the rounds it took."""
        rounds = 0
        while self.engine.width() > 0:
            self.round()
            rounds += 1
        return rounds


def on(tensors: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def build(
    method: str,
    *,
    flow: Any = None,
    reward: Any = None,
    schedule: Schedule | None = None,
    slots: int = 2,
    micro_batch: int = 16,
    top: int = 1,
    dtype: torch.dtype = torch.float32,
    device: torch.device = CPU,
    scripted: bool = False,
    module: Any = None,
    **options: Any,
) -> Bench:
    """options: fields of SearchConfig (budget 40 and steps 6 unless given). module: in place of the method's own."""
    flow = (flow or GaussianFlow()).to(device)
    reward = (reward or NearTarget()).to(device)
    config = make_config({"method": method, "budget": 40, "steps": 6, "top_k": top, **options})
    resolved = resolve(flow, config.params)
    if schedule is not None:
        resolved = replace(resolved, schedule=schedule.guided(None) if resolved.passes == 2 else schedule)
    schedule, plan = resolved.schedule, resolved.plan(config.budget or 0)
    conditions = flow.encode(["a"]), reward.encode(["a"])
    engine: Any = resolved.batch(flow, reward, plan, slots, micro_batch, *conditions, device, dtype)
    if module:
        engine.method = module(plan, slots).to(device)
    if scripted:
        engine = torch.jit.script(engine)
    return Bench(engine, plan, schedule, flow, reward, resolved.guidance, device)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that differ in any bit; NaN equals NaN."""
    assert left.keys() == right.keys()
    return [name for name in left if not torch.equal(bits(left[name]), bits(right[name]))]


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.int32) if tensor.dtype == torch.float32 else tensor
