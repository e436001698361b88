"""The files of a `flowfast generate` whose prompts are found elsewhere and come in any order.

The folders are those of generate.py. gathered.jsonl beside them says which prompts are done, a line each, written when
all that belongs to a prompt is on the disk: `--resume` asks for the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flowfast.config import SearchConfig
from flowfast.engine.checkpoint import unpacked_sample
from flowfast.report import geneval
from flowfast.report.generate import CALL, GATHERED, GenerateFiles
from flowfast.report.write import (
    Lines,
    damaged,
    json_line,
    read_lines,
    write_bytes,
    write_json,
    write_same,
    write_text,
    write_yaml,
)
from flowfast.version import versions


@dataclass(frozen=True)
class Shown:
    """What the table has of a prompt."""

    reward: float
    heldout: float | None
    nfe: int


class GatheredFiles(GenerateFiles):
    """`start`, `on_row` for each prompt that is done, then `finish`."""

    def start(self) -> None:
        done = self._read() if self.resumed else {}
        super().start()  # which forgets a call that was stopped here, with its list of what is done
        if not self.resumed:
            self._remove_earlier()
        self.done: dict[int, dict[str, Any]] = done
        write_text(self.out / GATHERED, "".join(map(json_line, done.values())))
        self.journal = Lines(self.out / GATHERED, sync=True)
        if not self.resumed:
            write_yaml(self.out / CALL, self.call | self.config.model_dump())

    def _read(self) -> dict[int, dict[str, Any]]:
        path, found = self.out / GATHERED, {}
        for count, line in enumerate(read_lines(path), 1):
            try:
                if 0 <= line["prompt"] < len(self.prompts) and line["config"] and line["batch"]["seconds"]:
                    found[int(line["prompt"])] = line
            except (KeyError, TypeError, ValueError) as error:
                raise damaged(path, count, error) from None
        return found

    @property
    def waiting(self) -> list[tuple[int, str]]:
        """The prompts that are not done, by their place in `prompts`."""
        return [(index, prompt) for index, prompt in enumerate(self.prompts) if index not in self.done]

    def on_row(self, row: dict[str, Any]) -> None:
        """A prompt is done: `row` has the columns of a recording searcher, and `number`, its place in `prompts`."""
        index, config = row["number"], json.loads(row["config"])
        folder, sample = self.folders[index], unpacked_sample(self.prompts[index], row["sample"])
        if self.layout == "geneval":
            write_text(folder / "metadata.jsonl", json.dumps(geneval.metadata(self.prompts[index])) + "\n")
        names = ("round", "chain", "transition", "candidate", "t", "reward", "finished", "status", "nfe")
        seen = ({"prompt": index, **dict(zip(names, each[1:], strict=True))} for each in json.loads(row["candidates"]))
        write_text(folder / "candidates.jsonl", "".join(map(json_line, seen)))
        undrawn = len(self.undrawn)
        self.on_sample(index, sample)
        self._draw(folder / "search.png", partial(self._write_search, folder / "search.png", row["picture"]))
        line = {"prompt": index, "config": config, "batch": json.loads(row["batch"])}
        if len(self.undrawn) == undrawn:  # else it is asked for again
            self.journal.add(line)
        self.done[index] = line

    def _write_search(self, path: Path, picture: bytes) -> None:
        if not picture:
            raise ValueError("its search could not be drawn where it ran")
        write_bytes(path, picture)

    def gathered(self, seconds: float) -> list[Shown]:
        """What only the whole call knows, now that it has taken so many seconds; in the order of those that are done.
        Where all are and nothing is left to draw, the call is forgotten."""
        batches = {line["batch"]["id"]: line["batch"] for line in self.done.values()}
        parts = {name: total(batches.values(), name) for name in ("model", "decode", "reward", "search")}
        padded, nan = (sum(batch[name] for batch in batches.values()) for name in ("rows_padded", "nan_rewards"))
        shown: list[Shown] = []
        first: tuple[Path, dict[str, Any]] | None = None
        for index, line in sorted(self.done.items()):
            folder, config = self.folders[index], line["config"]
            found = json.loads((folder / "result.json").read_text(encoding="utf-8"))
            ran = {name: config[name] for name in ("method", "picked", "micro_batch", "splits")}
            whole = {"rows_padded": padded, **ran, "nan_rewards": nan, "versions": versions()}
            write_json(folder / "result.json", found | whole)
            timing = {"prompts": len(self.prompts), "seconds": {"total": seconds, **parts}, "overshoot": None}
            write_json(folder / "timing.json", timing)
            if first is not None and first[1] == config:
                write_same(folder / "config.yaml", first[0])
            else:
                write_yaml(folder / "config.yaml", self.call | SearchConfig(**config).model_dump())
                first = first or (folder / "config.yaml", config)
            shown.append(Shown(float(found["reward"]), found["heldout"], found["nfe"]))
        self.journal.close()
        if not self.undrawn and not self.waiting:
            self.checkpoint.remove()  # of a call that began without a cluster
            (self.out / CALL).unlink(missing_ok=True)
            (self.out / GATHERED).unlink(missing_ok=True)
        return shown


def total(batches: Iterable[dict[str, Any]], part: str) -> float:
    return sum(batch["seconds"][part] for batch in batches)
