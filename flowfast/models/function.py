"""An own model: a plain velocity function as a Flow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from flowfast.errors import OptionError
from flowfast.models import answers
from flowfast.types import Flow, FlowDefaults


class FunctionFlow:
    """A plain velocity function as a Flow."""

    def __init__(
        self, velocity: Callable, shape: Sequence[int], decode: Callable | None, encode: Callable | None, **facts: Any
    ):
        self.shape = answers.latent_shape(shape)
        self.interpolant: str = facts["interpolant"]
        self.t_finish: float = facts["t_finish"]
        self.guidance: float = facts["guidance"]
        self._velocity, self._decode, self._encode, self._preview = velocity, decode, encode, facts["preview"]

    @property
    def defaults(self) -> FlowDefaults:
        return FlowDefaults(preview=self._preview, reads_prompts=self._encode is not None)

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return self._encode(prompts) if self._encode else answers.nothing(len(prompts))

    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return answers.velocity_of(self._velocity(x_t, t, cond), x_t)

    def decode(self, x0: Tensor) -> Tensor:
        return answers.images_of(self._decode(x0), x0) if self._decode else x0


def flow_from(
    velocity: Callable[[Tensor, Tensor, dict[str, Tensor]], Tensor],
    shape: Sequence[int],
    decode: Callable[[Tensor], Tensor] | None = None,
    encode: Callable[[list[str]], dict[str, Tensor]] | None = None,
    interpolant: str = "linear",
    t_finish: float = 0.1,
    guidance: float = 1.0,
    preview: Callable[[Tensor], Tensor] | None = None,
) -> Flow:
    """An own model: velocity(x_t (N, *shape), t (N,), cond) -> u_t (N, *shape), t = 1 noise.

    decode turns x0 into what the reward sees (default: x0 itself); encode turns prompts into tensors (N, ...). What
    else they may answer: flowfast/models/answers.py.
    t_finish is the linear-equivalent time at or below which a posterior mean counts as a finished sample. preview: a
    cheaper decode for the search to look through; its finalists are decoded in full and scored again.
    """
    for name, part in {"velocity": velocity, "decode": decode, "encode": encode, "preview": preview}.items():
        if not callable(part) and (name == "velocity" or part is not None):
            raise OptionError(f"expected {name} to be a function, got {type(part).__name__}")
    facts = {"interpolant": interpolant, "t_finish": t_finish, "guidance": guidance, "preview": preview}
    return FunctionFlow(velocity, shape, decode, encode, **facts)
