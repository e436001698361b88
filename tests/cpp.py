"""The C++ runner as `make cpp` builds and installs it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PREFIX, TESTS = ROOT / "build/prefix", ROOT / "build/runner-cpu/csrc/runner"


def command(*argv: object, **options: object) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PATH": TOOLS},
        **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def install() -> Path:
    """Where flowfast is installed; builds are kept, so only what changed is compiled again."""
    for tool in ("c++", "cmake", "ninja"):
        if shutil.which(tool, path=TOOLS) is None:
            pytest.skip(f"{tool} is not on PATH, and there is no runner without it")
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/.lock").open("w") as lock:  # of all workers of a run one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        command("cmake", "--preset", "cpu", f"-DPython3_EXECUTABLE={sys.executable}")
        command("cmake", "--build", "--preset", "cpu")
        command("cmake", "--install", "build/runner-cpu")
    return PREFIX
