"""A model, a decoder and a reward that cost nothing, and a search around them: what is left is the search itself."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from flowfast.config import make_config
from flowfast.ops.noise import noise_key
from flowfast.resolve import resolve
from flowfast.rounds.batch import Limits


class NullFlow(nn.Module):
    """velocity hands out the same zeros every time; decode and encode do nothing.

    shape: of a latent; rows: most rows of a call; condition: shape of a prompt's condition, which the search carries.
    """

    zeros: Tensor

    def __init__(
        self,
        shape: tuple[int, ...],
        rows: int,
        dtype: torch.dtype,
        condition: tuple[int, ...] = (1,),
        device: torch.device | None = None,
    ):
        super().__init__()
        self.shape, self.condition = shape, condition
        self.interpolant, self.t_finish, self.guidance = "linear", 0.1, 1.0
        self.register_buffer("zeros", torch.zeros(rows, *shape, dtype=dtype, device=device))

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"condition": self.zeros.new_zeros(len(prompts), *self.condition)}

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        assert cond["condition"].size(0) == x_t.size(0)  # else TorchScript sees that nobody needs it
        return self.zeros[: x_t.size(0)]

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        return x0


class NullReward(nn.Module):
    """The first number of an image: no arithmetic, yet different for every child, so that some are accepted."""

    name, range, differentiable = "null", (-1e9, 1e9), False

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {"nothing": torch.zeros(len(prompts), 1)}

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return first_number(images)


def first_number(images: Tensor) -> Tensor:
    """(N,) float32 of images (N, ...)."""
    return images.flatten(1)[:, 0].float().contiguous() if len(images) else images.new_zeros([0])


class NullSearch:
    """Requests through the slots of `flowfast.rounds`: by default one slot, RBF with the options of its public code.

    options: fields of SearchConfig in place of those.
    """

    def __init__(
        self,
        flow: Any,
        *,
        budget: int,
        dtype: torch.dtype,
        scripted: bool = False,
        slots: int = 1,
        device: torch.device | None = None,
        **options: Any,
    ):
        config = make_config({"method": "rbf-official", "budget": budget, "chains": 2, "steps": 10, **options})
        self.resolved = resolve(flow, config.params)
        self.plan, self.flow, self.slots = self.resolved.plan(budget), flow, slots
        plan, reward = self.plan, NullReward()
        self.engine: Any = self.resolved.batch(
            flow,
            reward,
            plan,
            slots,
            slots * plan.chains * plan.lanes,
            flow.encode(["a"]),
            reward.encode(["a"]),
            device or torch.device("cpu"),
            dtype,
        )
        start = plan.start or [True] * plan.chains
        self.keys = [noise_key(config.seed, str(slot)) for slot in range(slots)]
        self.conditions = flow.encode(["a"]), flow.encode([""]), reward.encode(["a"])
        self.numbers = [torch.tensor(values, device=device) for values in (plan.quota, plan.left, start)]
        if scripted:
            self.engine = torch.jit.script(self.engine)

    def admit(self) -> None:
        """A request into every slot."""
        for slot, key in enumerate(self.keys):
            limits = Limits(*self.numbers, *self.plan.forecast()[:3])
            self.engine.admit(slot, *self.conditions, key, limits, 1.0, float("inf"), None)

    def round(self) -> None:
        self.engine.observe(first_number(self.engine.propose()))

    def operations(self) -> "Operations":
        """What the rounds of one request run, the reward's own operators left out."""
        counted = Operations()
        self.admit()
        while self.engine.width() > 0:
            with counted:
                images = self.engine.propose()
            rewards = first_number(images)
            with counted:
                self.engine.observe(rewards)
        return counted

    def run(self) -> dict[str, Tensor]:
        """Requests from admission to release; what the last slot found."""
        self.admit()
        while self.engine.width() > 0:
            self.round()
        return [self.engine.release(slot) for slot in range(self.slots)][-1]


class Operations(TorchDispatchMode):
    """Counts the operators that run while it is open.

    calls: every operator that reaches PyTorch's dispatcher; launches: those that do work, so neither views nor
    allocations. An op of flowfast counts once, whatever its kernel does inside.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        aliases = [value.alias_info for value in func._schema.returns]
        view = name in ("_unsafe_view", "_reshape_alias") or any(a is not None and not a.is_write for a in aliases)
        self.calls += 1
        self.launches += not (view or name.startswith(("empty", "new_empty")))
        return func(*args, **(kwargs or {}))
