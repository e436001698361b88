"""What all benchmarks share: paired timing, one kind of row, what the machine is, files that are whole or not there.

A *row* says how long ours takes beside one peer, in the same process and run:

    name, batch, shape, dtype, threads   what was measured
    ours_ms, peer, peer_ms, ratio        medians of one call; ratio = peer_ms / ours_ms, above 1: ours is faster
    ours_quartiles_ms, peer_quartiles_ms [first, third]
    bytes, gb_s                          what ours has to move at least, and that per second of ours_ms; null: not a
                                         matter of traffic
    versions                             flowfast, torch, python, processor, instruction_set, ...

A row may carry more keys of its own. What could not be measured stands in `left_out` with the reason.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flowfast import ops
from flowfast.report.machine import processor
from flowfast.version import versions as flowfast_versions

FLUX = (4096, 64)
"""Latent of one 1024 x 1024 image of FLUX: tokens, channels."""


@dataclass(frozen=True)
class Options:
    """How much to measure. quick: the smallest sizes, to see that everything runs; its figures mean nothing."""

    quick: bool = False
    threads: int = 1
    rounds: int | None = None
    public_code: Path | None = None

    def turns(self, full: int) -> int:
        """Turns that every candidate gets: 3 when quick, else as asked for, else `full`."""
        return 3 if self.quick else self.rounds or full


class Times(NamedTuple):
    """Milliseconds of one call: median and quartiles over the turns."""

    median: float
    first: float
    third: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Times:
        ms = [1e3 * value for value in seconds]
        low, middle, high = statistics.quantiles(ms, n=4, method="inclusive") if len(ms) > 1 else 3 * ms
        return cls(middle, low, high)


class Suite:
    """Rows of one run, by benchmark."""

    def __init__(self, options: Options) -> None:
        self.options = options
        self.results: dict[str, dict[str, list[dict[str, Any]]]] = {}

    def row(
        self,
        name: str,
        *,
        batch: int,
        shape: Sequence[int],
        dtype: torch.dtype,
        ours: Times,
        peer: str,
        theirs: Times,
        bytes: int | None = None,
        **more: Any,
    ) -> dict[str, Any]:
        """Adds a row and returns it."""
        row = {
            "name": name,
            "batch": batch,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."),
            "threads": torch.get_num_threads(),
            "ours_ms": ours.median,
            "ours_quartiles_ms": [ours.first, ours.third],
            "peer": peer,
            "peer_ms": theirs.median,
            "peer_quartiles_ms": [theirs.first, theirs.third],
            "ratio": theirs.median / ours.median,
            "bytes": bytes,
            "gb_s": None if bytes is None else bytes / ours.median / 1e6,
            **more,
            "versions": versions(),
        }
        self.of(name)["rows"].append(row)
        return row

    def leave_out(self, name: str, peer: str, reason: str) -> None:
        entry = {"name": name, "peer": peer, "reason": reason}
        if entry not in self.of(name)["left_out"]:
            self.of(name)["left_out"].append(entry)

    def of(self, name: str) -> dict[str, list[dict[str, Any]]]:
        return self.results.setdefault(name, {"rows": [], "left_out": []})


def paired(
    benchmark: Any, candidates: dict[str, Callable[[], object]], rounds: int, calls: int = 1
) -> dict[str, Times]:
    """Times of one call of each candidate; the first one is ours and goes to pytest-benchmark as well.

    The candidates take turns, so that a change of the machine's load hits all of them. In its turn a candidate runs
    once untimed (its data are where it leaves them, not where the one before left its own) and then `calls` times.
    """
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    ours, *peers = candidates

    def repeat(run: Callable[[], object]) -> None:
        for _ in range(calls):
            run()

    def others() -> None:
        for name in peers:
            candidates[name]()
            start = time.perf_counter()
            repeat(candidates[name])
            seconds[name].append((time.perf_counter() - start) / calls)
        candidates[ours]()

    def own() -> None:
        start = time.perf_counter()
        repeat(candidates[ours])
        seconds[ours].append((time.perf_counter() - start) / calls)

    benchmark.pedantic(own, setup=others, rounds=rounds, iterations=1)
    return {name: Times.of(values) for name, values in seconds.items()}


def versions() -> dict[str, str]:
    return {
        **flowfast_versions(),
        "python": platform.python_version(),
        "processor": processor(),
        "cores": str(os.cpu_count()),
        "instruction_set": ops.instruction_set() or "none",
    }


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile at its best: static shapes, and eager's own random numbers (inductor's are scalar on the CPU and
    take 7 to 9 times as long)."""
    torch._inductor.config.fallback_random = True
    return torch.compile(function, dynamic=False)


def table(results: dict[str, dict[str, list[dict[str, Any]]]]) -> str:
    """All rows as text."""
    lines = [
        f"{'name':<22} {'peer':<14} {'batch':>5} {'shape':<11} {'dtype':<9}"
        f"{'ours ms':>10} {'peer ms':>10} {'ratio':>7} {'GB/s':>6}"
    ]
    for result in results.values():
        for row in result["rows"]:
            shape, rate = "x".join(map(str, row["shape"])), f"{row['gb_s']:6.1f}" if row["gb_s"] else "     -"
            ours = " ".join(row[key] for key in ("case", "setting", "engine", "backend") if row.get(key))
            lines.append(
                f"{row['name']:<22} {row['peer']:<14} {row['batch']:>5} {shape:<11} {row['dtype']:<9}"
                f"{row['ours_ms']:>10.4f} {row['peer_ms']:>10.4f} {row['ratio']:>7.2f} {rate} {ours}".rstrip()
            )
        lines += [f"left out: {entry['name']} / {entry['peer']}: {entry['reason']}" for entry in result["left_out"]]
    return "\n".join(lines)
