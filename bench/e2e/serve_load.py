"""`flowfast serve` on `scenes` under load, as a process of its own beside its clients: what it costs beside the engine
alone, and what becomes of each request.

    python -m bench.e2e.serve_load --out bench/results/serve_load.json

`throughput`: the same requests through an `Engine` in this process and through the server, all waiting, in turns that
begin with one and the other; `ratio` is requests a second of the server / of the engine. `lone`: one request at a time
through the server and through an `AsyncEngine` in this process, in turns. `on_top_ms` is what a client waits beyond
the engine's own seconds of that very request (`total_s` of the answer; `Finished.seconds`), so that a machine that is
busy with other things between two requests does not count: sending, reading, encoding the prompt, the picture, hops
between threads; `ratio`d nowhere, the figure is the difference of the two medians. `crowd`: clients that ask again as
soon as they have an answer, of whom some vanish in the middle and some stream; each request has an id, and the
server's log exactly one line for it. `freed`: all clients of a full server hang up; how many rounds begin until nothing
runs. `deadlines`: clients with deadlines; `late` are answers later than deadline + a round. `sigterm`: what becomes of
requests as the server is told to stop.

Each row has the load average of the machine before and after: with other processes on its cores times say little,
counts still hold.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import flowfast
from flowfast.benchmark.client import Answer, Client
from flowfast.benchmark.load import send
from flowfast.benchmark.load_results import fill
from flowfast.benchmark.run import Run, serve
from flowfast.benchmark.statistics import spread
from flowfast.models.scenes import hard_prompts
from flowfast.report.machine import machine
from flowfast.report.write import write_json
from flowfast.version import versions

ROOT = Path(__file__).resolve().parents[2]
PROMPTS = hard_prompts("tuning")
SLOTS = 16
ROWS = "flowfast:rows_total"
RUNNING, WAITING = "flowfast:num_requests_running", "flowfast:num_requests_waiting"


@dataclass
class Server:
    process: subprocess.Popen[str]
    url: str
    log: Path

    def lines(self) -> Counter[str]:
        """Requests of the log by their id."""
        found = Counter[str]()
        for line in self.log.read_text().splitlines():
            if line.startswith("{"):
                found[json.loads(line)["request"]] += 1
        return found

    def open_files(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    def resident_kb(self) -> int:
        return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{self.process.pid}/status").read_text())[0])


@contextmanager
def started(*options: str, slots: int = SLOTS) -> Iterator[Server]:
    """`flowfast serve`, ready."""
    argv = [sys.executable, "-m", "flowfast.cli", "serve", "--model", "scenes", "--port", "0", *options]
    argv += ["--slots", str(slots), "--quality", "low=50,medium=100"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    env.pop("FLOWFAST_API_KEY", None)
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with (
            log.open("w") as errors,
            subprocess.Popen(
                argv, stdout=subprocess.PIPE, stderr=errors, text=True, env=env, start_new_session=True
            ) as process,
        ):
            try:
                assert process.stdout is not None
                url = process.stdout.readline().split()[2].removesuffix("/v1;")
                assert process.stdout.readline() == "ready\n", log.read_text()
                yield Server(process, url, log)
            finally:
                process.kill()


def body_of(at: int, budget: int = 50, **more: Any) -> dict[str, Any]:
    return {"prompt": PROMPTS[at % len(PROMPTS)], "seed": at, "method": "svdd", "budget": budget, **more}


def silent(*_: object) -> None:
    pass


# ---- beside the engine ----


async def throughput(server: Server, requests: int, turns: int) -> dict[str, Any]:
    """All requests of a turn wait at once, so that neither side waits for its client."""
    rates: dict[str, list[float]] = {"engine": [], "server": []}
    with flowfast.Engine("scenes", reward="scenes", slots=SLOTS, max_budget=100) as engine:
        async with Client(server.url) as client:

            async def by_server(bodies: list[dict[str, Any]]) -> float:
                start = time.perf_counter()
                answers = await send(client, [(0.0, body) for body in bodies], len(bodies), silent)
                assert {answer.kind for answer in answers} == {"ok"}, Counter(answer.message for answer in answers)
                return time.perf_counter() - start

            async def by_engine(bodies: list[dict[str, Any]]) -> float:
                run = Run()
                serve(engine, bodies, len(bodies), run)
                return run.seconds

            for turn in range(-1, turns):
                part = range(turn * requests // turns, (turn + 1) * requests // turns) if turn >= 0 else range(SLOTS)
                bodies = [body_of(at) for at in part]
                sides = [("engine", by_engine), ("server", by_server)]
                for name, run in sides[:: 1 if turn % 2 else -1]:
                    seconds = await run(bodies)
                    if turn >= 0:
                        rates[name].append(len(bodies) / seconds)
    paired = [theirs / ours for ours, theirs in zip(rates["engine"], rates["server"], strict=True)]
    seconds = {name: sum(requests / turns / rate for rate in found) for name, found in rates.items()}
    return {
        "requests": requests, "turns": turns, "ratio": statistics.median(paired), "ratios": paired,
        "ratio_of_all": seconds["engine"] / seconds["server"], "requests_per_s": rates,
    }  # fmt: skip


async def lone(server: Server, turns: int) -> dict[str, Any]:
    top: dict[str, list[float]] = {"server": [], "engine": []}
    whole: dict[str, list[float]] = {"server": [], "engine": []}
    made = flowfast.AsyncEngine("scenes", reward="scenes", slots=SLOTS, max_budget=100)
    async with made as engine, Client(server.url) as client:

        async def by_server(body: dict[str, Any]) -> tuple[float, float]:
            start = time.perf_counter()
            async with client.session.post("/v1/images/generations", json=body) as response:
                found = await response.json()
            return time.perf_counter() - start, found["data"][0]["flowfast"]["total_s"]

        async def by_engine(body: dict[str, Any]) -> tuple[float, float]:
            start, inside = time.perf_counter(), 0.0
            async with aclosing(engine.generate(**body)) as events:
                async for event in events:
                    if isinstance(event, flowfast.Finished):
                        inside = event.seconds
            return time.perf_counter() - start, inside

        for turn in range(-3, turns):
            sides = [("engine", by_engine), ("server", by_server)]
            for name, run in sides[:: 1 if turn % 2 else -1]:
                seconds, inside = await run(body_of(max(turn, 0)))
                if turn >= 0:
                    whole[name].append(1e3 * seconds)
                    top[name].append(1e3 * (seconds - inside))
    medians = {name: statistics.median(values) for name, values in top.items()}
    differences = [theirs - ours for ours, theirs in zip(whole["engine"], whole["server"], strict=True)]
    return {
        "turns": turns, "on_top_ms": medians["server"] - medians["engine"], "beyond_the_engine_ms": medians,
        "beyond_the_engine_p95_ms": {name: sorted(values)[int(0.95 * turns)] for name, values in top.items()},
        "latency_ms": {name: statistics.median(values) for name, values in whole.items()},
        "difference_ms": statistics.median(differences),
    }  # fmt: skip


# ---- many clients ----


@dataclass
class Seen:
    """What clients saw."""

    ends: dict[str, str] = field(default_factory=dict)
    """By the request's id; "": it has none yet."""
    refused: list[float] = field(default_factory=list)
    latencies: list[float] = field(default_factory=list)
    memory: list[tuple[int, int]] = field(default_factory=list)
    """(requests that have ended, kilobytes)."""


async def one(client: Client, rng: random.Random, seen: Seen, typical: float) -> None:
    """A request: a fifth vanish in the middle, a tenth stream."""
    at, share = len(seen.ends), rng.random()
    body, id = body_of(at), f"crowd-{at}"
    seen.ends[id] = ""
    if share < 0.1:
        body |= {"stream": True, "partial_images": 2}
    leaves = rng.uniform(0.05, 0.95) * typical if share > 0.8 else None
    try:
        async with asyncio.timeout(leaves):
            answer = await client.ask(body, id)
    except TimeoutError:
        seen.ends[id] = "vanished"
        return
    seen.ends[id] = answer.kind
    if answer.kind == "queue_full":
        seen.refused.append(answer.seconds)
        await asyncio.sleep(0.25)
    elif answer.kind == "ok":
        seen.latencies.append(answer.seconds)


async def crowd(server: Server, clients: int, seconds: float) -> dict[str, Any]:
    seen = Seen()
    async with Client(server.url) as client:
        first = await send(client, [(0.0, body_of(at)) for at in range(8)], 8, silent)
        typical = statistics.median(answer.seconds for answer in first)
        before, files, start = await client.metrics(), server.open_files(), time.perf_counter()

        async def ask(number: int) -> None:
            rng = random.Random(number)
            while time.perf_counter() - start < seconds:
                await one(client, rng, seen, typical)

        async def watch() -> dict[str, float]:
            while time.perf_counter() - start < seconds - 0.5:
                await asyncio.sleep(0.25)
                seen.memory.append((sum(map(bool, seen.ends.values())), server.resident_kb()))
            return await client.metrics()  # while all of them ask

        busy, *_ = await asyncio.gather(watch(), *(ask(number) for number in range(clients)))
        after = await idle(client)
    found = counted(seen, server.lines())
    found |= {"fill": fill(before, busy), "fill_to_the_end": fill(before, after)}
    for _ in range(100):  # connections end a moment after their clients
        if server.open_files() > files:
            await asyncio.sleep(0.1)
    found |= {"files_more": server.open_files() - files}
    return found | {"clients": clients, "seconds": seconds, "typical_s": typical}


async def idle(client: Client) -> dict[str, float]:
    """/metrics once nothing runs or waits."""
    while (now := await client.metrics())[RUNNING] + now[WAITING]:
        await asyncio.sleep(0.005)
    return now


def counted(seen: Seen, lines: Counter[str]) -> dict[str, Any]:
    """lines: of the server's log, by id. A client may vanish before its request was read: then there is none."""
    settled = [(count, kb) for count, kb in seen.memory if count > len(seen.ends) / 6]
    slope = (
        statistics.linear_regression(*zip(*settled, strict=True)).slope
        if len({count for count, _ in settled}) > 2
        else None
    )
    answered = Counter(str(lines[id]) for id, end in seen.ends.items() if end != "vanished")
    left = Counter(str(lines[id]) for id, end in seen.ends.items() if end == "vanished")
    return {
        "requests": len(seen.ends), "ends": dict(Counter(seen.ends.values())),
        "log_lines_each": dict(answered), "log_lines_each_that_vanished": dict(left),
        "refused_ms": thousand(spread(seen.refused)), "latency_ms": thousand(spread(seen.latencies)),
        "memory_kib_a_request": slope, "resident_kb": [settled[0][1], settled[-1][1]] if settled else None,
    }  # fmt: skip


def thousand(found: dict[str, float] | None) -> dict[str, float] | None:
    return found and {name: 1e3 * value for name, value in found.items()}


async def freed(server: Server, times: int) -> dict[str, Any]:
    """All clients of a full server hang up; rows that the model sees until nothing runs or waits."""
    rows, seconds = list[float](), list[float]()
    async with Client(server.url) as client:
        (one_round, round_seconds) = await a_round(client)
        for turn in range(times):
            tasks = [asyncio.create_task(client.ask(body_of(at, 100))) for at in range(2 * SLOTS)]
            while (now := await client.metrics())[RUNNING] < SLOTS or now[WAITING] < SLOTS:
                await asyncio.sleep(0.002)
            await asyncio.sleep(0.05 + 0.007 * turn)
            before, start = await client.metrics(), time.perf_counter()
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
            now = await idle(client)
            seconds.append(time.perf_counter() - start)
            rows.append((now[ROWS] - before[ROWS]) / one_round)
    return {
        "times": times, "rounds_after": rows, "rounds_after_most": max(rows), "freed_ms": thousand(spread(seconds)),
        "round_ms": 1e3 * round_seconds,
    }  # fmt: skip


async def a_round(client: Client) -> tuple[float, float]:
    """Rows of a round with all slots taken, and its seconds."""
    tasks = [asyncio.create_task(client.ask(body_of(at, 100))) for at in range(2 * SLOTS)]
    seen = list[tuple[float, float]]()
    while not all(task.done() for task in tasks):
        now = await client.metrics()
        if now[RUNNING] == SLOTS and (not seen or now[ROWS] != seen[-1][1]):
            seen.append((time.perf_counter(), now[ROWS]))
        await asyncio.sleep(0.001)
    steps = [later[1] - each[1] for each, later in zip(seen, seen[1:], strict=False)]
    gaps = [later[0] - each[0] for each, later in zip(seen, seen[1:], strict=False)]
    return statistics.mode(steps), statistics.median(gaps)


async def deadlines(server: Server, clients: int, requests: int) -> dict[str, Any]:
    """Deadlines from half of what a request takes here to five times of it."""
    rng, late, ends, over = random.Random(0), Counter[str](), Counter[str](), list[float]()
    async with Client(server.url) as client:
        _, round_seconds = await a_round(client)
        first = await send(client, [(0.0, body_of(at, 100)) for at in range(clients)], clients, silent)
        typical = statistics.median(answer.seconds for answer in first)
        numbers = iter(range(requests))

        async def ask() -> None:
            for at in numbers:
                given = typical * rng.uniform(0.5, 5)
                body = body_of(at, 100, deadline_ms=max(1, round(1e3 * given)))
                async with client.session.post("/v1/images/generations", json=body) as response:
                    found = await response.json()
                if response.status == 200:
                    beyond = found["data"][0]["flowfast"]["total_s"] - given
                    over.append(1e3 * beyond)
                    ends["pictures"] += 1
                    late["in time"] += beyond <= 0
                    late["within a round"] += 0 < beyond <= round_seconds
                    late["later"] += beyond > round_seconds
                    continue
                error = found["error"]
                waited = "waited for" in error["message"]
                ends["admitted, then told that it is too late" if waited else f"refused: {error['code']}"] += 1

        await asyncio.gather(*(ask() for _ in range(clients)))
    admitted = ends["pictures"] + ends["admitted, then told that it is too late"]
    on_time = late["in time"] + late["within a round"]
    return {
        "clients": clients, "requests": requests, "typical_s": typical, "round_ms": 1e3 * round_seconds,
        "ends": dict(ends), "admitted": admitted, "pictures": dict(late), "on_time_share": on_time / max(1, admitted),
        "beyond_ms": spread(over),
    }  # fmt: skip


async def sigterm(server: Server, clients: int) -> dict[str, Any]:
    async with Client(server.url) as client:
        tasks = [asyncio.create_task(client.ask(body_of(at, 100))) for at in range(clients)]
        while (now := await client.metrics())[RUNNING] + now[WAITING] < clients:
            await asyncio.sleep(0.005)
        start = time.perf_counter()
        server.process.send_signal(signal.SIGTERM)
        while (await client.get("/ready"))[0] != 503:
            pass
        told = time.perf_counter() - start
        after: Answer = await client.ask(body_of(0))
        ends = Counter([answer.kind for answer in await asyncio.gather(*tasks)])
    code = await asyncio.to_thread(server.process.wait, 120)
    return {
        "under_way": clients, "ready_503_ms": 1e3 * told, "one_that_came_after": after.kind, "ends": dict(ends),
        "seconds": time.perf_counter() - start, "exit": code,
    }  # fmt: skip


ALL = ("throughput", "lone", "crowd", "freed", "deadlines", "sigterm")


async def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    queue = {"throughput": "512", "crowd": "32"}.get(name, "64")
    with started("--queue", queue, "--drain-seconds", "4") as server:
        match name:
            case "throughput":
                return await throughput(server, arguments.requests, arguments.turns)
            case "lone":
                return await lone(server, 20 * arguments.turns)
            case "crowd":
                return await crowd(server, arguments.clients, arguments.seconds)
            case "freed":
                return await freed(server, 2 * arguments.turns)
            case "deadlines":
                return await deadlines(server, 24, arguments.requests)
        return await sigterm(server, 48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench/results/serve_load.json")
    parser.add_argument("--only", default=",".join(ALL), help="rows, with commas; others stay as they are in --out")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends, too
    found = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    for name in arguments.only.split(","):
        before = os.getloadavg()[0]
        row = asyncio.run(measure(name, arguments))
        row["load_average"] = [before, os.getloadavg()[0]]
        found = {"machine": machine(), "versions": versions(), **found, name: row}
        write_json(arguments.out, found)
        print(name, json.dumps(row, indent=1), flush=True)


if __name__ == "__main__":
    main()
