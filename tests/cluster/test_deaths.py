"""The driver is killed: nothing that was asked for is lost, and nothing runs on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowfast import cli
from tests.cluster.test_cluster import PROMPTS, files_of

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parent.parent.parent
PATIENCE = 600.0


def until(what: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_driver_that_is_killed_goes_on_and_leaves_no_processes(tmp_path: Path) -> None:
    alone, out = tmp_path / "alone", tmp_path / "out"
    call = ["generate", *PROMPTS[:6], "--budget", "40", "--micro-batch", "4", "--slots", "1"]
    assert cli.main([*call, "--out", str(alone)]) == 0
    command = [sys.executable, "-m", "flowfast.cli", *call, "--ray", "local", "--actors", "2", "--out", str(out)]
    driver = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    done = out / "gathered.jsonl"
    until(lambda: driver.poll() is not None or (done.exists() and done.read_text().count("\n") >= 1))
    assert driver.poll() is None
    daemons = [each for each in psutil.Process(driver.pid).children(recursive=True)]
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    kept = done.read_text().count("\n")
    assert 1 <= kept < 6
    until(lambda: not any(each.is_running() and each.status() != psutil.STATUS_ZOMBIE for each in daemons))
    subprocess.run(
        [*command[:3], "generate", "--resume", str(out), "--ray", "local"], check=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert files_of(out) == files_of(alone) and len(files_of(out)) == 18
