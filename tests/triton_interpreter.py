"""Tests of the Triton kernels on a machine without a GPU: a pytest process of their own.

Triton decides whether to interpret when a kernel is defined, its own library included, so TRITON_INTERPRET must be set
before anything imports it; and it would change every other test of that process.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def require() -> None:
    """Skips a test where the interpreter cannot have the bits of the reference."""
    pytest.importorskip("triton", reason="triton is not installed")
    version = importlib.metadata.version("triton")
    if tuple(map(int, version.split(".")[:2])) < (3, 9):
        pytest.skip(
            f"the interpreter of triton {version} rounds an fma twice (and 3.6's fails on numpy from 2.4 on): "
            "the kernels' bits can be compared from triton 3.9 on"
        )


def passed(*arguments: str) -> int:
    """Runs `pytest arguments` with TRITON_INTERPRET=1 in the repository; how many tests passed.

    Raises:
        AssertionError: one failed, or was skipped; with what pytest printed.
    """
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    last = result.stdout.strip().rsplit("\n", 1)[-1]
    found = re.match(r"(\d+) passed", last)
    assert result.returncode == 0 and found and "skipped" not in last, result.stdout[-6000:] + result.stderr[-2000:]
    return int(found[1])
