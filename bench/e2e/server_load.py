"""examples/cpp/server under load: wrk's clients ask as fast as they get answers, then clients are killed.

    make server && flowfast export --model scenes --reward scenes --method rbf --out scenes.pt
    python -m bench.e2e.server_load scenes.pt --clients 64 --seconds 60

Prints JSON: what was sent, answers by status, errors (there must be none), milliseconds of those that got images and
of all answers, kilobytes of resident memory with their slope (from /proc, the first sixth left out), and how long
after 2 clients a slot were killed their slots and places in the queue were free, beside the time of a round with all
slots busy. Fails where an answer is missing or a status is none of 200, 429, 503. wrk (Debian: `apt install wrk`) runs
on this machine too, so the figures share its cores; it does not wait as Retry-After asks it to.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import time
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from flowfast.archive.load import read_info

ROOT = Path(__file__).resolve().parents[2]
PATH = "/v1/images/generations"
HEADERS = {"Content-Type": "application/json"}
PROMPT = "three red circles and one blue square"


def metrics(port: int) -> dict[str, float]:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def ask(port: int, budget: int, images: int = 1) -> HTTPConnection:
    connection = HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", PATH, json.dumps({"prompt": PROMPT, "budget": budget, "n": images}), HEADERS)
    return connection


def wait_for(port: int, busy: int) -> float:
    """Seconds until as many searches run or wait."""
    start = time.perf_counter()
    while (found := metrics(port))["flowfast_slots_running"] + found["flowfast_queue_length"] != busy:
        if time.perf_counter() - start > 60:
            raise SystemExit(f"expected {busy} searches under way, found {found}")
        time.sleep(0.0005)
    return time.perf_counter() - start


def resident_kb(pid: int) -> int:
    return int(re.findall(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())[0])


def under_load(arguments: argparse.Namespace, server: subprocess.Popen[str], port: int) -> dict[str, Any]:
    before = metrics(port)
    argv = [arguments.wrk, "-t", "2", "-c", str(arguments.clients), "-d", f"{arguments.seconds}s", "--timeout", "60s"]
    argv += ["-s", str(Path(__file__).with_suffix(".lua")), f"http://127.0.0.1:{port}", "--", str(arguments.budget)]
    memory: list[tuple[float, int]] = []
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as wrk:
        start = time.monotonic()
        while wrk.poll() is None:
            memory.append((time.monotonic() - start, resident_kb(server.pid)))
            time.sleep(0.25)
        assert wrk.stdout is not None
        found: dict[str, Any] = json.loads(wrk.stdout.read().splitlines()[-1])
    wait_for(port, 0)  # wrk hangs up in the midst of its last requests
    after = metrics(port)

    settled = [(second, kb) for second, kb in memory if second > arguments.seconds / 6]
    slope = statistics.linear_regression(*zip(*settled, strict=True)).slope
    found["resident_kb"] = {"first": settled[0][1], "last": settled[-1][1], "a_minute": round(60 * slope)}
    answered = {name: int(after[name] - before.get(name, 0)) for name in after if name.startswith("flowfast_requests")}
    found["server"] = {
        status: count for name, count in answered.items() for status in re.findall(f'"{PATH}",status="(...)"', name)
    } | {"cancelled": int(after["flowfast_cancelled_total"] - before["flowfast_cancelled_total"])}

    received, left = sum(found["statuses"].values()), sum(found["server"].values())
    assert not any(found["errors"].values()), found
    assert set(found["statuses"]) <= {"200", "429", "503"}, found
    assert 0 <= found["sent"] - received <= arguments.clients, f"answers are missing: {found}"
    assert 0 <= found["sent"] - left <= arguments.clients, f"the server lost requests: {found}"
    return found


def after_kills(archive: Path, port: int) -> dict[str, float]:
    info = read_info(archive)
    slots, budget = int(info["slots"]), int(info["budget_max"])
    connection = ask(port, budget, images=slots)
    image = json.loads(connection.getresponse().read())["data"][0]["flowfast"]
    seconds = image["total_s"] - image["queue_s"]
    rounds = image["nfe"] / (int(info["passes"]) * int(info["chains"]) * int(info["lanes"]))
    times = []
    for turn in range(20):
        clients = [ask(port, budget) for _ in range(2 * slots)]
        wait_for(port, 2 * slots)
        time.sleep(0.1 + 0.007 * turn)  # at any point of a round
        for client in clients:
            client.close()
        times.append(wait_for(port, 0))
    connection.close()
    return {
        "freed_ms": 1e3 * statistics.median(times), "freed_ms_most": 1e3 * max(times),
        "round_ms": 1e3 * seconds / rounds, "search_ms": 1e3 * seconds,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("archive", type=Path)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--budget", type=int, default=24)
    parser.add_argument("--queue", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server", type=Path, default=ROOT / "build/server/flowfast-server")
    parser.add_argument("--wrk", default=shutil.which("wrk"))
    arguments = parser.parse_args()
    if arguments.wrk is None:
        parser.error("wrk is not on PATH: install it or name it with --wrk")
    argv = [str(arguments.server), str(arguments.archive), "--port", "0"]
    argv += ["--queue", str(arguments.queue), "--threads", str(arguments.threads)]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            port = int(server.stdout.readline().rsplit(":", 1)[1])
            ask(port, arguments.budget).getresponse().read()  # warms up
            found = under_load(arguments, server, port) | {"after_kills": after_kills(arguments.archive, port)}
            server.terminate()
            found["exit"] = server.wait(60)
            print(json.dumps(found, indent=2))
        finally:
            server.kill()


if __name__ == "__main__":
    main()
