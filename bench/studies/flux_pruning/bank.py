"""Rewards of images that were drawn elsewhere, after every step, and the times of these steps."""

from __future__ import annotations

import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from bench.studies.flux_pruning.halving import Floats, Ints, keys_of
from flowfast.errors import OptionError
from flowfast.flow.grid import grid_times
from flowfast.flow.interpolant import parse_interpolant
from flowfast.models.diffusers.base import resolution_shift

REWARDS = {"imr": "ImageReward", "pic": "PickScore", "hps": "HPSv2"}
"""Names of the arrays, and of the rewards."""
LEAST = (4, 20, 3)
"""Prompts, images and steps that the study needs."""
TOKENS = 32 * 32
"""Of an image of 512 x 512, for FLUX's shift of its times."""


@dataclass(frozen=True, eq=False)
class Bank:
    """Rewards (P, N, T) of P prompts, N images each, T steps, by the reward's name."""

    rewards: dict[str, Floats]

    @property
    def shape(self) -> tuple[int, int, int]:
        P, N, T = next(iter(self.rewards.values())).shape
        return P, N, T

    def half(self, first: int) -> Bank:
        """Every second prompt from `first` on."""
        return Bank({name: values[first::2] for name, values in self.rewards.items()})

    @cached_property
    def keys(self) -> dict[str, Ints]:
        return {name: keys_of(values) for name, values in self.rewards.items()}

    @cached_property
    def finals(self) -> dict[str, Floats]:
        """(P, N): the reward after the last step, in standard deviations of a prompt's images from their mean."""
        last = {name: values[..., -1] for name, values in self.rewards.items()}
        return {name: (v - v.mean(1, keepdims=True)) / v.std(1, keepdims=True) for name, v in last.items()}


def read(source: Path) -> Bank:
    """From an .npz file, or from the text files of simulation/values. Raises OptionError."""
    try:
        found = read_folder(source) if source.is_dir() else read_npz(source)
    except OSError as error:
        raise OptionError(f"cannot read {error.filename or source}: {error.strerror or error}") from None
    except (ValueError, zipfile.BadZipFile) as error:
        raise OptionError(f"{source}: expected an .npz file of rewards, or a folder of them: {error}") from None
    check(found)
    return Bank({REWARDS[name]: values.astype(np.float64) for name, values in found.items()})


def check(found: dict[str, Floats]) -> None:
    """Raises OptionError where they cannot be compared."""
    shapes = {name: values.shape for name, values in found.items()}
    first = next(iter(shapes.values()))
    if {*shapes.values()} != {first} or len(first) != 3 or any(a < b for a, b in zip(first, LEAST, strict=True)):
        raise OptionError(f"expected arrays of one shape (prompts, images, steps), at least {LEAST}, got {shapes}")
    for name, values in found.items():
        if not np.isfinite(values).all():
            raise OptionError(f"{name}: expected finite rewards, got NaN or infinity: leave those prompts out")
        spread = values[..., -1].max(1) - values[..., -1].min(1)
        if not spread.all():
            raise OptionError(f"{name}: all finished images of prompt {spread.argmin()} have one reward: leave it out")


def read_npz(path: Path) -> dict[str, Floats]:
    with np.load(path, allow_pickle=False) as arrays:
        missing = [name for name in REWARDS if name not in getattr(arrays, "files", [])]
        if missing:
            raise OptionError(f"{path}: expected arrays {', '.join(REWARDS)}, but {', '.join(missing)} is missing")
        return {name: arrays[name] for name in REWARDS}


def read_folder(folder: Path) -> dict[str, Floats]:
    """The files of a reward are one a step, each a mapping of prompts to lists: "0:", then "- -2.18", ..."""
    found = {}
    for name in REWARDS:
        steps = sorted((folder / f"flux_{name}_val_base").glob("*_s[0-9][0-9].yaml"))
        if not steps:
            raise OptionError(
                f"{folder}: expected a folder flux_{name}_val_base with a file p..._s00.yaml a step in it"
            )
        found[name] = np.stack([read_step(path.read_text(encoding="utf-8")) for path in steps], axis=-1)
    return found


def read_step(text: str) -> Floats:
    """(prompts, images), float32: as the numbers were before they were written out."""
    lists: list[list[float]] = []
    for line in text.splitlines():
        if line.endswith(":"):
            lists.append([])
        elif line.startswith("- ") and lists:
            lists[-1].append(float(line[2:]))
        else:
            raise ValueError(f"a line {line[:40]!r} among its prompts and numbers")
    return np.array(lists, dtype=np.float32)


def flux_times(steps: int) -> list[float]:
    """Linear times at which FLUX.1-dev's own sampler evaluates it at 512 x 512."""
    linear = parse_interpolant("linear")
    return grid_times("shift", steps, path=linear, model=linear, shift=resolution_shift({}, TOKENS))
