"""The one wheel under other versions of PyTorch: the tests of ops, rounds and methods, and the same picture as here.

    python tests/matrix.py 2.11.0 2.15.0

Each version gets an environment of its own in build/matrix, one at a time: 3 to 5 GB, removed when its tests passed.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MATRIX = ROOT / "build/matrix"
TESTS = MATRIX / "tests"  # without the sources of flowfast: the wheel's are tested
PICTURE = ("generate", "two red circles and one blue square", "--method", "rbf", "--budget", "60", "--seed", "3")


def run(*command: str | Path, folder: Path = MATRIX) -> str:
    """What a command prints; stops all where it fails, with its output."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWFAST", "PYTHONPATH"))}
    own |= {"PIP_CONSTRAINT": os.devnull, "OMP_NUM_THREADS": "1"}  # a machine's cap would keep a version away
    done = subprocess.run([str(word) for word in command], cwd=folder, env=own, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout}{done.stderr}")
    return done.stdout


def reward(python: Path) -> float:
    """Draws one picture of `scenes` with compiled ops; its reward."""
    live = json.loads(run(python, "-m", "flowfast.cli", "info", "--json"))["ops"]
    if {op["backend"] for op in live.values()} != {"cpp"}:
        sys.exit(f"the compiled ops are not in use: {live}")
    with tempfile.TemporaryDirectory() as out:
        run(python, "-m", "flowfast.cli", *PICTURE, "--out", out)
        (result,) = Path(out).glob("00-*/result.json")
        return json.loads(result.read_text())["reward"]


def main(versions: list[str]) -> None:
    shutil.rmtree(MATRIX, ignore_errors=True)
    TESTS.mkdir(parents=True)
    for name in ("tests", "bench", "pyproject.toml"):
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copy)(ROOT / name, TESTS / name)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-build-isolation", "--no-deps", "-w", MATRIX, ROOT)
    (wheel,) = MATRIX.glob("*.whl")
    here = reward(Path(sys.executable))
    for version in versions:
        environment = MATRIX / f"torch-{version}"
        python = environment / "bin/python"
        run(sys.executable, "-m", "venv", environment)
        run(python, "-m", "pip", "install", "-q", f"torch=={version}", wheel, "pytest", "hypothesis")
        there = reward(python)
        if abs(here - there) > 1e-5:
            sys.exit(f"torch {version}: the picture's reward is {there}, not {here}")
        said = run(
            python,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/ops",
            "tests/rounds",
            "tests/methods",
            "--ignore=tests/ops/test_layout.py",  # compares files that are written from the sources
            folder=TESTS,
        )
        print(f"torch {version}: reward {there:.7f} (here {here:.7f}); {said.strip().splitlines()[-1]}", flush=True)
        shutil.rmtree(environment)


if __name__ == "__main__":
    main(sys.argv[1:])
