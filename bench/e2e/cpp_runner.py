"""The same search in Python and in flowfast-run; its start-up; its memory over 1,000 searches.

    make cpp && python -m bench cpp_runner

`scenes`, 4 prompts in 4 slots, RBF, 200 NFE, micro-batches of 8: the same winners on both sides, which is checked.
`ours_ms` is the time from the first admission to the last result in a process of flowfast-run that has just started;
the peer `python` is `flowfast.search` in a process that is warm. `start_up_s` is the whole of `flowfast-run --info`:
linking, reading, checking and loading the archive. `cpu_s` are seconds of a processor, which a busy machine changes
less: of the whole process of flowfast-run, start-up included, of Python's search alone, and of the start-up. Memory is
VmRSS after every tenth of 1,000 searches of 24 NFE in one process; `rss_slope_kib` and its standard error are of a line
through what follows the first 100.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import flowfast
from bench.timing import Suite, Times
from flowfast import rewards
from flowfast.models.scenes import hard_prompts

PROGRAM = Path(__file__).resolve().parents[2] / "build/prefix/bin/flowfast-run"
SIZES = {"method": "rbf", "slots": 4, "micro_batch": 8}


def rss_kib(pid: int) -> int:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))


def memory(program: list[str], searches: int) -> list[tuple[int, int]]:
    """(searches done, VmRSS in KiB) after every tenth search of a process that makes so many."""
    found = []
    with subprocess.Popen(program, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for done, _ in enumerate(process.stdout, 1):
            if done % 10 == 0 and done < searches:  # after the last one it ends
                found.append((done, rss_kib(process.pid)))
    assert process.returncode == 0
    return found


def slope(points: list[tuple[int, int]]) -> tuple[float, float]:
    """Of a line through the points, and its standard error."""
    x, y = np.array(points, dtype=float).T
    x = x - x.mean()
    found = float(x @ y / (x @ x))
    rest = y - y.mean() - found * x
    return found, float(np.sqrt(rest @ rest / max(1, len(x) - 2) / (x @ x)))


def cpu_seconds() -> float:
    """Of all processes that this one has started and that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_cpp_runner(benchmark: Any, suite: Suite, tmp_path: Path) -> None:
    if not PROGRAM.exists():
        suite.leave_out("cpp_runner", "python", "flowfast-run is not built: make cpp")
        pytest.skip("flowfast-run is not built: make cpp")
    options = suite.options
    count, budget, searches = (2, 24, 40) if options.quick else (4, 200, 1000)
    flow, prompts, archive = flowfast.load("scenes"), hard_prompts("tuning"), tmp_path / "scenes.pt"
    reward, asked = rewards.load("scenes", flow), prompts[:count]
    flowfast.export(flow, archive, reward="scenes", model="scenes", budget=budget, **SIZES)
    program = [str(PROGRAM), str(archive), "--threads", str(torch.get_num_threads()), "--json"]
    words = [word for prompt in asked for word in ("--prompt", prompt)]
    seconds: dict[str, list[float]] = {"ours": [], "python": [], "start_up": []}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}

    def turn() -> None:
        start, cpu_start = time.perf_counter(), time.process_time()
        result = flowfast.search(flow, asked, reward=reward, budget=budget, **SIZES)
        seconds["python"].append(time.perf_counter() - start)
        cpu["python"].append(time.process_time() - cpu_start)
        before = cpu_seconds()
        said = subprocess.run([*program, *words, "--budget", str(budget)], check=True, capture_output=True).stdout
        found = [json.loads(line) for line in said.splitlines()]
        seconds["ours"].append(max(entry["seconds"]["waited"] + entry["seconds"]["search"] for entry in found))
        start, after = time.perf_counter(), cpu_seconds()
        subprocess.run([*program, "--info"], check=True, capture_output=True)
        seconds["start_up"].append(time.perf_counter() - start)
        cpu["ours"].append(after - before)
        cpu["start_up"].append(cpu_seconds() - after)
        for entry, sample in zip(found, result.samples, strict=True):
            assert entry["reward"] == sample.reward
            assert [tuple(step) for step in entry["path"]] == list(sample.winner.path)

    turn()  # warms Python up
    for values in (*seconds.values(), *cpu.values()):
        values.clear()
    benchmark.pedantic(turn, rounds=options.turns(7), iterations=1)

    listed = tmp_path / "prompts.txt"
    listed.write_text("\n".join((prompts * searches)[:searches]))
    points = memory([*program, "--prompts", str(listed), "--budget", "24"], searches)
    steady = [point for point in points if point[0] >= searches // 10]
    growth, error = slope(steady)
    suite.row(
        "cpp_runner", batch=count, shape=flow.shape, dtype=torch.float32, ours=Times.of(seconds["ours"]),
        peer="python", theirs=Times.of(seconds["python"]), budget=budget, method="rbf",
        start_up_s=statistics.median(seconds["start_up"]),
        cpu_s={name: statistics.median(values) for name, values in cpu.items()},
        searches=searches, rss_mib=steady[-1][1] / 1024,
        rss_slope_kib=growth, rss_slope_error_kib=error, rss_range_kib=float(np.ptp([kib for _, kib in steady])),
    )  # fmt: skip
