"""The C++ runner as `make cpp` builds and installs it, and an archive of `scenes` for it."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import flowfast

ROOT = Path(__file__).resolve().parents[2]
TOOLS = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
PREFIX, TESTS = ROOT / "build/prefix", ROOT / "build/cpu/csrc/runner"


def command(*argv: object, **options: object) -> str:
    """What a command says; it must succeed."""
    done = subprocess.run(
        [str(word) for word in argv], capture_output=True, text=True, cwd=ROOT, env=os.environ | {"PATH": TOOLS},
        **options,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="session")
def prefix() -> Path:
    """Where flowfast is installed; builds are kept, so only what changed is compiled again."""
    for tool in ("c++", "cmake", "ninja"):
        if shutil.which(tool, path=TOOLS) is None:
            pytest.skip(f"{tool} is not on PATH, and there is no runner without it")
    (ROOT / "build").mkdir(exist_ok=True)
    with (ROOT / "build/.lock").open("w") as lock:  # of all workers of a run one builds
        fcntl.flock(lock, fcntl.LOCK_EX)
        command("cmake", "--preset", "cpu", f"-DPython3_EXECUTABLE={sys.executable}")
        command("cmake", "--build", "--preset", "cpu")
        command("cmake", "--install", "build/cpu")
    return PREFIX


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the embedded model: RBF, two slots, micro-batches of 4 rows, up to 200 NFE."""
    path = tmp_path_factory.mktemp("archive") / "scenes.pt"
    flowfast.export(
        flowfast.load("scenes"), path, reward="scenes", method="rbf", budget=200, slots=2, micro_batch=4, model="scenes"
    )
    return path
