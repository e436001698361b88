"""Two checkouts of flowfast against each other, in turns: what a change costs or saves.

    python -m bench.versions OLD [NEW] [--case host,scripted,bon] [--starts 7] [--turns 9] [--cpu 0]

OLD and NEW (default: this one) are folders with their libraries built. A process of each warms up and then does one
unit of work whenever it is its turn, so that both see the same machine; where their memory came to lie alone may be
worth a tenth, so pairs of processes are started several times. Shown are medians over the starts, and the range of
their ratios. One thread. Cases: `host`, an RBF search beside a null model, 400 NFE, which is the host's work of its
rounds; `scripted`, the same in TorchScript; `call`, such a search in a whole call of `flowfast.search`, 2,000 NFE;
`slots`, a call with 16 prompts at once; `bon`, best-of-n on `scenes`, 4 prompts, 100 NFE.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NULL = """
from bench.e2e.null import NullFlow, NullSearch
search = NullSearch(NullFlow((4, 4), 2, torch.float32), budget=400, dtype=torch.float32, scripted={scripted})
work = search.run
"""
BON = """
import flowfast
flow = flowfast.load("scenes")
prompts = ["two red circles and one blue square", "a red circle left of a green triangle", "three yellow crosses",
           "one green square and two blue triangles"]
work = lambda: flowfast.search(flow, prompts, reward="scenes", method="bon", budget=100, seed=0)
"""
CALL = """
import torch, flowfast
from bench.e2e.null import NullFlow, NullReward
flow, reward = NullFlow((4, 4), 32, torch.float32), NullReward()
options = dict(reward=reward, method="rbf", budget={budget}, seed=0, lanes=2, chains=1, micro_batch={rows}, steps=10)
work = lambda: flowfast.search(flow, [f"prompt {{i}}" for i in range({prompts})], **options)
"""
CASES = {
    "host": NULL.format(scripted=False),
    "scripted": NULL.format(scripted=True),
    "call": CALL.format(prompts=1, rows=2, budget=2000),
    "slots": CALL.format(prompts=16, rows=32, budget=1000),
    "bon": BON,
}
PROGRAM = """
import sys, time, torch
torch.set_num_threads(1)
{case}
for _ in range(4):
    work()
for _ in sys.stdin:
    start = time.perf_counter()
    work()
    print(time.perf_counter() - start, flush=True)
"""


def start(folder: Path, case: str, cpu: int) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM.format(case=CASES[case])]
    process = subprocess.Popen(
        command, cwd=folder, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    os.sched_setaffinity(process.pid, {cpu})
    return process


def seconds_of(process: subprocess.Popen[str]) -> float:
    """Of one unit of work. Raises RuntimeError where the process has died."""
    assert process.stdin and process.stdout
    process.stdin.write("\n")
    process.stdin.flush()
    answer = process.stdout.readline()
    if not answer:
        raise RuntimeError(f"{process.args!r} ended; its errors stand above")
    return float(answer)


def compare(old: Path, new: Path, case: str, turns: int, cpu: int) -> tuple[float, float]:
    """Median seconds of old and new."""
    processes = [start(folder, case, cpu) for folder in (old, new)]
    times: list[list[float]] = [[], []]
    try:
        for turn in range(turns):
            for side in (0, 1) if turn % 2 else (1, 0):
                times[side].append(seconds_of(processes[side]))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return statistics.median(times[0]), statistics.median(times[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path, nargs="?", default=ROOT)
    parser.add_argument("--case", default=",".join(CASES), help="of host, scripted, bon")
    parser.add_argument("--starts", type=int, default=7)
    parser.add_argument("--turns", type=int, default=9, help="of each start")
    parser.add_argument("--cpu", type=int, default=min(os.sched_getaffinity(0)))
    options = parser.parse_args(argv)
    for case in options.case.split(","):
        if case not in CASES:
            parser.error(f"no case {case!r}: choose of {', '.join(CASES)}")
        folders = options.old.resolve(), options.new.resolve()
        pairs = [compare(*folders, case, options.turns, options.cpu) for _ in range(options.starts)]
        old, new = (1e3 * statistics.median(times) for times in zip(*pairs, strict=True))
        ratios = sorted(new / old for old, new in pairs)
        middle = f"{statistics.median(ratios):.3f}x ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        print(f"{case}: {old:.2f} ms, {new:.2f} ms: {middle}", flush=True)


if __name__ == "__main__":
    main()
