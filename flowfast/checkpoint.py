"""A search on disk while it runs, so that one that was killed goes on to the identical result.

One safetensors file: the tensors of every group's state, of the method and of the samples that are done, and as its
metadata one JSON text with what the host knows. It is written whole, between rounds; a round that was under way then
is run again, from the same state, with the same noise. It is also written before a finished prompt is decoded, so that
a decoder that fails takes nothing with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.files import write_bytes
from flowfast.searcher.loop import Search
from flowfast.searcher.state import State
from flowfast.searcher.steered import Steered
from flowfast.types import Ranked, Sample, Winner

FORMAT = 2


@dataclass(frozen=True)
class Held:
    """A search between two rounds: the tensors of its state, on the CPU, and what the host knows."""

    tensors: dict[str, Tensor]
    facts: dict[str, Any]
    clocks: Any = None
    """Within one process: the clock, the deadline, and seconds spent on finding out how long a round takes."""
    most_images: int | None = None
    """Where memory ran out: images that a reward on the host gets at once."""


def state_of(engine: Search) -> dict[str, Tensor]:
    """All tensors that a round leaves to the next one, by name; they are the engine's own."""
    state = {f"state.{name}": getattr(engine.state, name) for name in State.__annotations__}
    if isinstance(engine, Steered):
        state["grad"] = engine.grad
    return state | {f"method.{name}": buffer for name, buffer in engine.method.named_buffers()}


def write(path: Path, held: Held) -> None:
    """Raises OutputError."""
    host = {name: tensor.contiguous() for name, tensor in held.tensors.items()}
    write_bytes(path, save(host, metadata={"flowfast": json.dumps({"format": FORMAT, **held.facts})}))


def read(path: Path) -> Held:
    """Raises OptionError: it is not a checkpoint, or one of another version."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads((file.metadata() or {}).get("flowfast", "{}"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise OptionError(f"cannot resume from {path}: {error}; remove it to start anew") from None
    if facts.get("format") != FORMAT:
        raise OptionError(f"cannot resume from {path}: not a checkpoint of this version; remove it to start anew")
    return Held(tensors, facts)


def check_same(path: Path, facts: dict[str, Any], now: dict[str, Any]) -> None:
    """Raises OptionError where the search that was killed is not the one that is asked for."""
    for name, value in now.items():
        if facts.get(name) != value:
            raise OptionError(
                f"cannot resume from {path}: it is of a search with {name} {facts.get(name)!r}, this one has "
                f"{value!r}; ask for the same search, or remove it to start anew"
            )


def pack_sample(index: int, sample: Sample, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """Puts a sample's tensors among `tensors`; returns the rest of it for JSON."""
    for k, ranked in enumerate(sample.top):
        for name in ("image", "latent", "x_t"):
            tensors[f"sample{index}.{k}.{name}"] = getattr(ranked, name)
    top = [
        {
            "reward": ranked.reward,
            "preview_reward": ranked.preview_reward,
            "winner": list(ranked.winner.__dict__.values()),
        }
        for ranked in sample.top
    ]
    return {**{name: value for name, value in sample.__dict__.items() if name != "top"}, "top": top}


def unpack_sample(index: int, found: dict[str, Any], tensors: dict[str, Tensor]) -> Sample:
    top = []
    for k, entry in enumerate(found["top"]):
        key, chain, row, candidate, path = entry["winner"]
        image, latent, x_t = (tensors[f"sample{index}.{k}.{name}"] for name in ("image", "latent", "x_t"))
        steps = tuple((step[0], step[1], step[2]) for step in path)
        winner = Winner(key, chain, row, candidate, steps)
        top.append(Ranked(entry["reward"], image, latent, x_t, winner, entry["preview_reward"]))
    return Sample(**{**found, "top": tuple(top)})


def load_into(engine: Search, tensors: dict[str, Tensor], prefix: str) -> None:
    """Fills an engine whose slots have been admitted."""
    for name, tensor in state_of(engine).items():
        tensor.copy_(tensors[prefix + name])
