"""Ray Data beside a plain loop over the same batches, 1, 2 and 4 actors, one of them killed: bits and seconds.

    python -m bench.e2e.ray_scaling --prompts 200 --budget 20 --turns 5 --out bench/results/ray.json

Seconds run from the first batch that begins to the last row that is back, so the start of actors is not in them; plain
loop, one actor and two actors take turns. Every run has one thread an actor. `cpu` are processor seconds of the
searches themselves, which another process on the machine changes little.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from flowfast.ray import Searcher
from flowfast.report.machine import processor
from flowfast.version import versions

KINDS = ("circles", "squares", "triangles", "crosses")
COLOURS = ("red", "blue", "green", "yellow")
COUNTS = ("two", "three", "four")


class Timed(Searcher):
    """Says when each batch began and how much processor it took. `mark`: a file; where it is given and not there, it is
    made in the second batch, and the process killed."""

    def __init__(self, mark: str | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.mark, self.calls = mark, 0

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        begun, cpu = time.time(), time.process_time()
        self.calls += 1
        if self.mark is not None and self.calls == 2 and not Path(self.mark).exists():
            Path(self.mark).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        found = super().__call__(batch)
        count, spent = len(found["prompt"]), time.process_time() - cpu
        return {**found, "begun": np.full(count, begun), "cpu": np.full(count, spent / count)}


def prompts_of(count: int) -> list[dict[str, Any]]:
    texts = [f"{number} {colour} {kind}" for number in COUNTS for colour in COLOURS for kind in KINDS]
    return [{"id": place, "prompt": texts[place % len(texts)], "repeat": place // len(texts)} for place in range(count)]


def plain_loop(searcher: Timed, rows: list[dict[str, Any]], size: int) -> list[dict[str, Any]]:
    found = []
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        batch = searcher({name: np.array([row[name] for row in part]) for name in part[0]})
        found += [{name: values[place] for name, values in batch.items()} for place in range(len(part))]
    return found


def on_ray(
    options: dict[str, Any], rows: list[dict[str, Any]], size: int, actors: int, mark: str | None = None
) -> list[Any]:
    import ray.data

    dataset = ray.data.from_items(rows, override_num_blocks=-(-len(rows) // size)).map_batches(
        Timed, fn_constructor_kwargs={**options, "mark": mark}, batch_size=None, num_cpus=1,
        compute=ray.data.ActorPoolStrategy(size=actors, max_tasks_in_flight_per_actor=2),
    )  # fmt: skip
    return list(dataset.iter_rows())


def bits(rows: list[dict[str, Any]]) -> dict[int, Any]:
    return {int(row["id"]): (row["reward"], row["nfe"], row["address"], row["image"].tobytes()) for row in rows}


def timed(work: Any) -> tuple[list[dict[str, Any]], dict[str, float]]:
    rows = work()
    seconds = time.time() - min(row["begun"] for row in rows)
    return rows, {"seconds": seconds, "cpu": float(sum(row["cpu"] for row in rows)), "load": os.getloadavg()[0]}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--budget", type=int, default=20)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    os.environ.setdefault("RAY_worker_niceness", str(os.nice(0)))  # as the plain loop; Ray's default is 15
    import ray

    options = dict(model="scenes", reward="scenes", method="bon", budget=asked.budget, micro_batch=8)
    size, rows, runs = asked.batch, prompts_of(asked.prompts), dict[str, list[dict[str, float]]]()
    ray.init(num_cpus=4, object_store_memory=100 * 2**20, include_dashboard=False, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False
    try:
        own = Timed(**options)
        expected, same = bits(plain_loop(own, rows, size)), dict[str, bool]()
        works = {"plain": lambda: plain_loop(own, rows, size), "1 actor": lambda: on_ray(options, rows, size, 1)}
        works["2 actors"] = lambda: on_ray(options, rows, size, 2)
        for _ in range(asked.turns):
            for name, work in works.items():
                found, spent = timed(work)
                same[name] = same.get(name, True) and bits(found) == expected
                runs.setdefault(name, []).append(spent)
        with tempfile.TemporaryDirectory() as folder:
            shuffled = [rows[place] for place in np.random.default_rng(1).permutation(len(rows))]
            same["4 actors, shuffled"] = bits(on_ray(options, shuffled, size, 4)) == expected
            killed = on_ray(options, shuffled, size, 2, str(Path(folder) / "mark"))
            same["2 actors, one killed"] = bits(killed) == expected and (Path(folder) / "mark").exists()
    finally:
        ray.shutdown()
    result = summary(asked, runs, same)
    print(json.dumps(result, indent=2))
    if asked.out:
        asked.out.write_text(json.dumps(result, indent=2) + "\n")


def summary(asked: Any, runs: dict[str, list[dict[str, float]]], same: dict[str, bool]) -> dict[str, Any]:
    """Ratios are of turns: each of a run and the plain loop right before it."""

    def ratios(one: str, other: str, what: str) -> dict[str, float]:
        each = [a[what] / b[what] for a, b in zip(runs[one], runs[other], strict=True)]
        return {"median": statistics.median(each), "least": min(each), "most": max(each)}

    return {
        "command": f"python -m bench.e2e.ray_scaling --prompts {asked.prompts} --budget {asked.budget} "
        f"--batch {asked.batch} --turns {asked.turns}",
        "machine": {"processor": processor(), "cores": os.cpu_count(), **versions()},
        "prompts": asked.prompts,
        "same_bits": same,
        "ray_over_plain_seconds": ratios("1 actor", "plain", "seconds"),
        "ray_over_plain_cpu": ratios("1 actor", "plain", "cpu"),
        "throughput_of_2_actors": ratios("plain", "2 actors", "seconds"),
        "cpu_of_2_actors": ratios("2 actors", "plain", "cpu"),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
