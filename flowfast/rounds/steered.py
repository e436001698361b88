"""Gradient guidance (DPS: Chung et al. 2023, arXiv 2209.14687): the reward's gradient steers every step of the search.

The score at x_t is shifted by strength x grad, grad = gradient of r(x0_hat(x_t)) with respect to x_t, *through* the
model. With x0_hat = D x + E u(x) and g = dr/dx0_hat that is

    grad = D g + E (du/dx)^T g          u after guidance: E (w u_cond + (1 - w) u_null)

and what the shift does to a step is G grad (flowfast/flow/schedule.py). For a reward that is linear in x0 and Gaussian
data this samples p(x0) exp(strength x r(x0)); elsewhere it is the usual approximation, E[exp r] by exp r(E[x0]).

The gradient belongs to a point, like its velocity: it is computed when a child is evaluated and used when the child has
become a parent, so the store has a third latent beside x and u. Velocity, x0_hat and reward of a point are those of a
search without steering, by the same ops. One micro-batch's graph lives at a time. Where guidance acts on some
transitions only, rows of the others go through the null condition, too, unread: they count as padding.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flowfast.errors import ModelError, RewardError
from flowfast.flow.schedule import COLUMNS
from flowfast.rounds.batch import SlotBatch

D, E, G = COLUMNS.index("D"), COLUMNS.index("E"), COLUMNS.index("G")


class Evaluated(NamedTuple):
    """Velocity u (M, n) of the condition, images, rewards (M,) and grad (M, n) of a micro-batch, without graphs."""

    u: Tensor
    images: Tensor
    rewards: Tensor
    grad: Tensor


def evaluate(
    flow: Any,
    reward: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    x: Tensor,
    t: Tensor,
    linear_t: Tensor,
    conds: list[dict[str, Tensor]],
    asked: dict[str, Tensor],
    guidance: Tensor | None,
    row: Tensor,
    table: Tensor,
    u_out: Tensor | None,
    x0_out: Tensor,
    broken: Tensor | None = None,
) -> Evaluated:
    """One micro-batch: velocity, posterior mean (written by the op as ever), image, reward, and the reward's gradient.

    Args:
        reward: (images, linear_t, asked) to rewards (M,), with their graph.
        x: (M, *shape).   t, linear_t: (M,) the model's times and linear ones.
        conds: the model's conditions, with two passes also the null conditions.   asked: the reward's.
        guidance, row, table, u_out, x0_out, broken: as `posterior_mean` takes them.

    Raises:
        ModelError, RewardError: a graph is cut on the way, so that the gradient would be wrong without a word.
    """
    M, x = x.shape[0], x.detach().requires_grad_()
    with torch.enable_grad():
        us = [flow.velocity(x, t, cond).reshape(M, -1) for cond in conds]
    _check_graph(us, ModelError, "the model's velocity")
    u, *null = [u.detach() for u in us]
    torch.ops.flowfast.posterior_mean(
        x.detach().view(M, -1), u, null[0] if null else None, guidance, row, table, u_out, x0_out, broken
    )
    x0 = x0_out.detach().requires_grad_()
    with torch.enable_grad():
        images = flow.decode(x0.view(x.shape))
        _check_graph([images], ModelError, "the model's decoder")
        rewards = reward(images, linear_t, asked)
    _check_graph([rewards], RewardError, "the reward, though it is declared differentiable,")
    g = _pull([rewards], x0, [torch.ones_like(rewards)], RewardError)
    coefficients = table.index_select(0, row.clamp(min=0))
    d, e = coefficients[:, D : D + 1], coefficients[:, E : E + 1]
    shares = [e] if guidance is None else [e * guidance.unsqueeze(1), e * (1 - guidance).unsqueeze(1)]
    through = _pull(us, x, [(share * g).to(u.dtype) for share in shares], ModelError)
    return Evaluated(u, images.detach(), rewards.detach(), d * g + through.view(M, -1))


def _check_graph(outputs: list[Tensor], kind: type[Exception], what: str) -> None:
    if not all(output.requires_grad for output in outputs):
        raise kind(
            f"gradient guidance: {what} has no gradient: it runs under no_grad or inference_mode, or leaves torch on "
            "the way; mend it, or search without dps"
        )


def _pull(outputs: list[Tensor], x: Tensor, cotangents: list[Tensor], kind: type[Exception]) -> Tensor:
    """The cotangents of outputs carried back to x; parameters gather nothing."""
    try:
        (found,) = torch.autograd.grad(outputs, x, cotangents)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        raise kind(f"gradient guidance: no gradient to be had: {error}; mend it, or search without dps") from error
    return found


@contextmanager
def frozen(*parts: Any) -> Iterator[None]:
    """No parameter of these (where they have `parameters()`) asks for a gradient inside: a graph then keeps only what
    the gradient of x needs."""
    asking = [p for part in parts for p in getattr(part, "parameters", tuple)() if p.requires_grad]
    for parameter in asking:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in asking:
            parameter.requires_grad_(True)


class Steered(SlotBatch):
    """A search whose steps follow the reward's gradient; its schedule has G. Runs in Python, not in TorchScript.

    reward(images, t, cond) gives rewards with their graph; it runs in `evaluate`, once a round.
    """

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.grad, self.grad_lane = torch.zeros_like(self.state.u), torch.zeros_like(self.x_lane)
        self.grad_part = self.grad_lane.split(self.micro_batch)
        # Does the row after it use the gradient at a row's point? The table's additional row is a start, like row 0.
        used = self.table[1:, G] != 0
        self.used = torch.cat([used, used[:1]])
        self.images: list[Tensor] = []
        self.rewards: list[Tensor] = []

    def size(self) -> tuple[int, int]:
        return self.passes * self.padded, self.scored_padded

    def branch(self) -> None:
        self.step(self.grad.index_select(0, self.parent.clamp(min=0)))

    def evaluate(self) -> None:
        self.images, self.rewards = [], []
        for i in range(self.padded // self.micro_batch):
            slot, row = self.slot_part[i], self.table_row_part[i]
            found = evaluate(
                self.flow,
                self.reward,
                self.x_shaped[i],
                self.t_part[i],
                self.linear_t_part[i],
                [self.take(cond, slot) for cond in (self.cond, self.null_cond)[: self.passes]],
                self.take(self.reward_cond, slot),
                self.guidance_part[i] if self.passes == 2 else None,
                row,
                self.table,
                None if self.direct else self.u_part[i],
                self.x0_part[i],
                self.broken_part[i],
            )
            if self.direct:
                self.u_lane = found.u
            self.grad_part[i].copy_(found.grad)
            # A child whose children would be NaN counts like one that is NaN itself.
            unsound = torch.logical_not(found.grad.isfinite().all(1))
            self.broken_part[i].logical_or_(unsound.logical_and_(self.used.index_select(0, row.clamp(min=0))))
            self.look(i, found.images)
            self.images.append(found.images)
            self.rewards.append(found.rewards)

    def decode(self) -> Tensor:
        return torch.cat(self.images)

    def score(self, images: Tensor) -> Tensor:
        return torch.cat(self.rewards)

    def settle(self, rewards: Tensor) -> None:
        super().settle(rewards)
        lane = self.grad_lane.index_select(0, self.store_source.clamp(min=0))
        self.grad.copy_(torch.where((self.store_source >= 0).unsqueeze(1), lane, self.grad))

    def gather(self, rows: Tensor) -> None:
        super().gather(rows)
        self.grad.copy_(self.grad.index_select(0, rows))
