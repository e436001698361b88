"""A search for each row of a dataset: `ray.data.Dataset.map_batches(flowfast.ray.Searcher, ...)`.

There is no Ray in this module: Ray Data calls a `Searcher` in an actor of its own as anybody may in a loop.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flowfast import secrets
from flowfast.config import SearchParams, make
from flowfast.engine.engine import Engine, EngineOptions
from flowfast.engine.request import Event, Failed, Finished
from flowfast.errors import FlowfastError, OptionError
from flowfast.memory import keep_memory
from flowfast.prompts import prompt_of, show
from flowfast.report.video import strip
from flowfast.rewards.pixels import to_pixels
from flowfast.types import Flow, Sample

PARAMS = tuple(name for name in SearchParams.model_fields if name not in ("seed", "seconds"))
"""Columns that are parameters of their row; `seed` is a field of its prompt, like `counts`."""
COLUMNS = ("image", "reward", "nfe", "address", "micro_batch", "error")
"""Columns that are added."""
FORMATS = ("array", "png", "jpeg", "webp")
MOST_EXACT = 2**53
"""Above, float64 does not hold every whole number."""


class Searcher:
    """Searches for the best sample of each row's prompt.

        dataset.map_batches(
            flowfast.ray.Searcher, fn_constructor_kwargs=dict(model="...", reward="clipscore", budget=200),
            batch_size=16, num_gpus=1, compute=ray.data.ActorPoolStrategy(size=8),
        )

    Columns in: `prompt`, and for each row, where they are there, fields of prompts (seed, counts, text, ...) and
    parameters (budget, repeat, negative_prompt, guidance, ...: PARAMS); None and NaN are as if they were not there. All
    columns stay. Columns out: `image`, `reward`, `nfe`, `address` (of the winner, JSON), `micro_batch`, and `error`,
    None where there is none: a row that cannot be drawn costs no other one.

    It is a `flowfast.Engine`, so at one micro-batch, number of threads and machine class a row has the same bits
    whatever other rows, batches and actors there are.

    Args:
        model, reward: as `flowfast.Engine` takes them. Names, rather than objects, load where they run.
        images: array, uint8 (H, W, 3), of a video (F, H, W, 3), empty where there is none; or png, jpeg, webp: bytes,
            of a video a strip of frames, None where there is none.
        threads: of PyTorch on the CPU.
        folder: where relative paths of model, reward and calibration begin, if it is there.
        secrets: values by names, FLOWFAST_MODEL_TOKEN say, for options that name them (flowfast/secrets.py).
        options: fields of EngineConfig and QueueConfig (slots, micro_batch, calibration, ...) and, for rows that do
            not say otherwise, of SearchParams (method, budget, ...).

    Raises:
        OptionError, WeightError: what is asked for does not exist, or does not go together.
    """

    def __init__(
        self, model: str | Flow = "scenes", reward: Any = "scenes", *, images: str = "array", threads: int = 1,
        folder: str | None = None, secrets: Mapping[str, Any] | None = None, **options: Any,
    ):  # fmt: skip
        if images not in FORMATS:
            raise OptionError(f"expected images to be one of {', '.join(FORMATS)}, got {show(images)}")
        if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
            raise OptionError(f"expected threads to be 1 .. 1024, got {show(threads)}")
        engine, self.params = sorted_options(options)
        know(secrets or {})
        torch.set_num_threads(threads)
        keep_memory()
        if folder is not None and os.path.isdir(folder):
            os.chdir(folder)
        engine.setdefault("max_budget", max(500, self.params.get("budget") or 0))
        self.engine = Engine(model, reward, **{**engine, "max_waiting": None})
        self.images = images

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, Any]:
        """A batch (of `batch_format="numpy"`) with what was found."""
        if not isinstance(batch, dict) or "prompt" not in batch:
            got = f"columns {', '.join(batch)}" if isinstance(batch, dict) else type(batch).__name__
            raise OptionError(f'expected a batch with a column "prompt" in batch_format="numpy", got {got}')
        if taken := [name for name in self.added if name in batch]:
            raise OptionError(f"column {taken[0]!r} is one that a search adds: rename it before (rename_columns)")
        rows = [
            {name: value for name, values in batch.items() if (value := plain(values[row])) is not None}
            for row in range(len(batch["prompt"]))
        ]
        found = self.search(rows)
        columns = {name: [row[name] for row in found] for name in self.added}
        return {**batch, **{name: column_of(values) for name, values in columns.items()}}

    @property
    def added(self) -> tuple[str, ...]:
        """Columns that this one adds."""
        return COLUMNS

    def search(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The new columns of each row."""
        ends: dict[str, Finished | str] = {}
        for number, row in enumerate(rows):
            try:
                prompt, params = self.request(row)
                self.engine.add_request(prompt, id=str(number), **params)
            except FlowfastError as error:
                ends[str(number)] = said(error)
        for event in self.engine.stream():
            self.heard(event)
            if isinstance(event, Finished):
                ends[event.id] = event
            elif isinstance(event, Failed):
                ends[event.id] = said(event.error)
        return [self.columns(row, ends[str(number)]) for number, row in enumerate(rows)]

    def request(self, row: dict[str, Any]) -> tuple[str, dict[str, Any]]:
        """The prompt and the parameters of a row. Raises FlowfastError."""
        for name, value in row.items():
            if isinstance(value, float) and name in ("seed", "repeat", "budget") and abs(value) > MOST_EXACT:
                raise OptionError(
                    f"expected {name} to be a whole number, got {value:g}, which has lost its last digits: a column "
                    "of numbers with gaps holds floats; write texts"
                )
        prompt = prompt_of({**row, "prompt": row.get("prompt")}, "this row")
        own = {name: row[name] for name in PARAMS if name in row}
        return prompt, {**self.params, **own}

    def heard(self, event: Event) -> None:
        """Each event, as it comes."""

    def columns(self, row: dict[str, Any], end: Finished | str) -> dict[str, Any]:
        """What a row gets."""
        if isinstance(end, str):
            nothing = dict.fromkeys(COLUMNS)
            empty = np.zeros((0, 0, 3), np.uint8) if self.images == "array" else None
            return {**nothing, "image": empty, "reward": float("nan"), "nfe": 0, "micro_batch": 0, "error": end}
        sample = end.sample
        return {
            "image": self.drawn(sample.image),
            "reward": sample.reward,
            "nfe": sample.nfe,
            "address": address_of(sample),
            "micro_batch": end.micro_batch,
            "error": None,
        }

    def drawn(self, image: Tensor) -> Any:
        """image (3, H, W), or (F, 3, H, W) of a video, in [0, 1], as a column has it."""
        if self.images == "array":
            return pixels_of(image)
        file = io.BytesIO()
        Image.fromarray(pixels_of(strip(image) if image.dim() == 4 else image)).save(file, self.images)
        return file.getvalue()


def sorted_options(options: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Those of an engine, and those of requests. Raises OptionError for others, and for a value that cannot work."""
    engine = {name: value for name, value in options.items() if name in EngineOptions.model_fields}
    params = {name: value for name, value in options.items() if name in SearchParams.model_fields}
    unknown = [name for name in options if name not in engine and name not in params]
    if unknown:
        names = sorted({*EngineOptions.model_fields, *SearchParams.model_fields} - {"seconds"})
        raise OptionError(f"unknown option {unknown[0]!r}: choose of {', '.join(names)}")
    if params.pop("seconds", None) is not None:
        raise OptionError("seconds are for one process (flowfast.search): give a budget in NFE")
    make(SearchParams, params)
    for name in ("model", "reward"):
        engine.pop(name, None)
    return engine, params


def know(values: Mapping[str, Any]) -> None:
    """Takes secrets over, by name. Raises OptionError."""
    for name in values:
        if not name.startswith("FLOWFAST_"):
            raise OptionError(f"expected names of secrets that begin with FLOWFAST_, got {show(name)}")
    secrets.GIVEN.update(values)


def plain(value: Any) -> Any:
    """A value of a column as Python has it; None for NaN, which stands for nothing in a column of numbers."""
    if isinstance(value, np.ndarray):
        return [plain(entry) for entry in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and value != value else value


def column_of(values: list[Any]) -> Any:
    """A column: one array where all are arrays of one shape."""
    if not isinstance(values[0], np.ndarray):
        return values
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    ragged = np.empty(len(values), dtype=object)
    for place, value in enumerate(values):
        ragged[place] = value
    return ragged


def pixels_of(image: Tensor) -> np.ndarray:
    """image (..., 3, H, W) in [0, 1] as uint8 (..., H, W, 3)."""
    shape = image.shape
    pixels = to_pixels(image.reshape(-1, *shape[-3:]))
    return pixels.view(shape).movedim(-3, -1).contiguous().numpy()


def address_of(sample: Sample) -> str:
    """JSON of `Winner`, by which the sample can be drawn again."""
    return json.dumps(asdict(sample.winner))


def said(error: FlowfastError) -> str:
    """An error for a column, without secrets."""
    return f"{type(error).__name__}: {secrets.hidden(' '.join(str(error).split()))}"
