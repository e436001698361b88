"""Model and reward leave Python: scripted, traced, or compiled by AOTInductor, and held to the eager ones."""

import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from flowfast.archive.load import in_order
from flowfast.errors import ModelError, RewardError
from flowfast.surroundings import modules_of
from flowfast.types import Conditions

log = logging.getLogger("flowfast.archive")
TOLERANCE = 1e-5
COMPILED_TOLERANCE = 2e-2  # also in bfloat16, where kernels that were fused round less often
"""Largest deviation of a part that left Python from the eager one, of the largest value."""


class Functions(nn.Module):
    """A model made of functions that were traced."""

    def __init__(self, velocity: Any, decode: Any, shape: tuple[int, ...]):
        super().__init__()
        self.velocity, self.decode, self.shape = velocity, decode, shape


class Model(nn.Module):
    """The calls of a model that the engine makes, alone, to see whether they script."""

    if TYPE_CHECKING:
        flow: Any

    def __init__(self, flow: nn.Module):
        super().__init__()
        self.flow = flow

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return self.flow.velocity(x_t, t, cond)

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        return self.flow.decode(x0)


class Outside(nn.Module):
    """In the place of a model or a reward that the driver calls itself; `hint` says what to do instead."""

    def __init__(self, hint: str, shape: tuple[int, ...] = ()):
        super().__init__()
        self.hint, self.shape = hint, shape

    @torch.jit.export
    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        return {}

    @torch.jit.export
    def velocity(self, x_t: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        raise ModelError("the model lies outside of this archive: " + self.hint)

    @torch.jit.export
    def decode(self, x0: Tensor) -> Tensor:
        raise ModelError("the decoder lies outside of this archive: " + self.hint)

    def forward(self, images: Tensor, t: Tensor, cond: dict[str, Tensor]) -> Tensor:
        raise RewardError("the reward lies outside of this archive: " + self.hint)


class Part(NamedTuple):
    """A function of a model or a reward, what it belongs to, and arguments for it: tensors of a micro-batch, and the
    conditions of all prompts that the archive knows, or of one."""

    function: Callable[..., Tensor]
    owner: Any
    tensors: tuple[Tensor, ...]
    cond: Conditions | None = None

    def rows(self, count: int, first: int = 0, step: int = 1) -> tuple[Any, ...]:
        """Arguments of `count` rows, with the conditions of every step-th prompt from `first` on."""
        index = torch.arange(count, device=self.tensors[0].device)
        tensors = tuple(tensor[index % len(tensor)] for tensor in self.tensors)
        if self.cond is None:
            return tensors
        return (*tensors, {name: value[(first + step * index) % len(value)] for name, value in self.cond.items()})

    @property
    def prompts(self) -> int:
        return len(next(iter(self.cond.values()))) if self.cond else 1

    def __str__(self) -> str:
        return f"{getattr(self.function, '__name__', 'forward')} of {type(self.owner).__name__}"


def parts_of(flow: Any, reward: Any, cond: Conditions, asked: Conditions, M: int) -> dict[str, Part]:
    device = next(iter(cond.values())).device
    x = torch.randn(M, *flow.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    x = x.to(device)
    t = torch.linspace(0.1, 0.9, M, dtype=torch.float32, device=device)
    parts = {"velocity": Part(flow.velocity, flow, (x, t), cond), "decode": Part(flow.decode, flow, (x,))}
    if not isinstance(reward, Outside):
        parts["reward"] = Part(reward.forward, reward, (flow.decode(x), t), asked)
    return parts


def torchscript(flow: Any, reward: Any, parts: dict[str, Part], null: Conditions, M: int) -> tuple[Any, Any]:
    """Model and reward in a form that scripts: their own, or traced. Raises ModelError where they do something else."""
    model = _scripted(Model(flow)) if isinstance(flow, nn.Module) else None
    if model is None:
        flow = Functions(_traced(parts["velocity"], M), _traced(parts["decode"], M), flow.shape)
        model = torch.jit.script(Model(flow))
    made: dict[str, Callable[..., Tensor]] = {"velocity": model.velocity, "decode": model.decode}
    if "reward" in parts:
        scripted = _scripted(reward)
        made["reward"] = scripted or _traced(parts["reward"], M)
        reward = reward if scripted else made["reward"]
    for name, function in made.items():
        for count in (M, 1) if name == "decode" else (M,):
            _check(function, parts[name], count)
    if null:  # it may have another shape
        _check(model.velocity, parts["velocity"]._replace(cond=null), M)
    return flow, reward


def _scripted(module: nn.Module) -> Any:
    """The module scripted, None where it does not script."""
    try:
        return torch.jit.script(module)
    except Exception as error:  # TorchScript may refuse in any way
        log.info("%s does not script, so it is traced: %s", type(module).__name__, error)
        return None


class Call(nn.Module):
    """A function as a module; weights that it uses become constants of its trace."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, *given: Any) -> Tensor:
        return self.function(*given)


def _traced(part: Part, M: int) -> Any:
    """The function traced with another number of rows than M, so that one taken down as a number shows."""
    try:
        return torch.jit.trace(Call(part.function), part.rows(3 if M == 2 else 2), check_trace=False)
    except Exception as error:
        raise ModelError(f"{part} can be neither scripted nor traced: {_reason(error)}") from error


def _check(made: Callable[..., Tensor], part: Part, count: int, tolerance: float = TOLERANCE) -> None:
    """Raises ModelError where the function that was made is another one. Thrice, for TorchScript optimises later, and
    with each prompt alone, for a trace may have kept what the prompts beside it said."""
    for first, step in ((0, 1), (0, 1), (0, 1), *((prompt, 0) for prompt in range(part.prompts))):
        wanted = part.function(*part.rows(count, first, step)).float()
        try:
            found = made(*part.rows(count, first, step)).float()
        except Exception as error:
            raise ModelError(f"{part} fails at {count} rows once it has left Python: {_reason(error)}") from error
        if found.shape != wanted.shape or not _alike(found, wanted, tolerance):
            raise ModelError(f"{part} gives something else at {count} rows once it has left Python")


def _alike(found: Tensor, wanted: Tensor, tolerance: float) -> bool:
    """Not finite in the same places (a search can live with that), elsewhere equal up to the tolerance."""
    finite = wanted.isfinite()
    found, wanted, there = found[finite], wanted[finite], found.isfinite()
    if not torch.equal(there, finite):
        return False
    return not len(wanted) or bool(((found - wanted).abs() <= tolerance * wanted.abs().amax()).all())


def _reason(error: Exception) -> str:
    """The line of a long text of torch's that says what happened."""
    lines = str(error).strip().splitlines() or [repr(error)]
    return lines[-1] if "Traceback of TorchScript" in str(error) else lines[0]


class Flat(nn.Module):
    """A part with its conditions as tensors in the order of their names, for packages."""

    def __init__(self, part: Part):
        super().__init__()
        self.function, self.owned = part.function, nn.ModuleList(modules_of(part.owner))
        self.names = None if part.cond is None else sorted(part.cond)

    def forward(self, *tensors: Tensor) -> Tensor:
        if self.names is None:
            return self.function(*tensors)
        return self.function(*tensors[:2], dict(zip(self.names, tensors[2:], strict=True)))


def compiled(part: Part, M: int) -> bytes:
    """The part as a package. Raises ModelError."""

    def flat(given: tuple[Any, ...]) -> tuple[Tensor, ...]:
        return given if part.cond is None else (*given[:-1], *in_order(given[-1], ""))

    with tempfile.TemporaryDirectory() as folder:
        try:
            program = torch.export.export(Flat(part), flat(part.rows(M)))
            package = torch._inductor.aoti_compile_and_package(program, package_path=f"{folder}/part.pt2")
            loaded = torch._inductor.aoti_load_package(package)
        except Exception as error:
            raise ModelError(f"{part} cannot be compiled by AOTInductor: {_reason(error)}") from error
        _check(lambda *given: loaded(*flat(given)), part, M, COMPILED_TOLERANCE)
        return Path(package).read_bytes()
