"""The runner under sanitizers (`make sanitize-cpp`), PyTorch itself left as it is; and mutants that they kill."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cpp import ROOT, command

pytestmark = pytest.mark.slow
TRACES = ROOT / "tests/engine/traces.json"
FLAGS = {"ON": ["-fsanitize=address,undefined"], "thread": ["-fsanitize=thread"]}
WITHOUT_TORCH = [
    "runner/searcher.cpp", "runner/engine.cpp", "runner/request.cpp", "runner/host_reward.cpp", "runner/seal.cpp",
    "runner/blake2b.cpp", "runner/png.cpp", "runner/text.cpp", "runner/json.cpp", "runner/tests/main.cpp",
    "runner/tests/test_pieces.cpp", "runner/tests/test_driver.cpp", "runner/tests/test_trace.cpp",
    "runner/tests/test_engine.cpp", "runner/tests/fake_archive.cpp",
]  # fmt: skip


@pytest.mark.parametrize("sanitizer", FLAGS)
def test_the_runner_is_clean(prefix: Path, scenes: Path, sanitizer: str) -> None:
    build = ROOT / f"build/runner-sanitized-{sanitizer}"
    options = {"FLOWFAST_RUNNER": "ON", "FLOWFAST_CUDA": "OFF", "FLOWFAST_SANITIZE": sanitizer}
    options["Python3_EXECUTABLE"] = sys.executable
    command("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", *(f"-D{name}={value}" for name, value in options.items()))
    command("cmake", "--build", build)
    assert "all checks passed" in command(build / "csrc/runner/flowfast_runner_tests", TRACES)
    assert "all checks passed" in command(build / "csrc/runner/flowfast_archive_tests", scenes)


# A slip in a file; the sanitizer, and what it or the check calls it.
MUTANTS = {
    "a counter read without its lock": (
        "runner/searcher.cpp", "  const std::lock_guard lock(impl_->mutex);\n  return impl_->running;",
        "  return impl_->running;", "thread", "data race",
    ),
    "a request queued without the lock": (
        "runner/searcher.cpp", "      const std::lock_guard lock(mutex);\n      if (draining", "      if (draining",
        "thread", "data race",
    ),
    "counters told without the lock": (
        "runner/searcher.cpp", "      const std::lock_guard lock(mutex);\n      running = ", "      running = ",
        "thread", "data race",
    ),
    "a row of pixels that is too long": (
        "runner/png.cpp", "y * stride, stride);", "y * stride, stride + 1);", "ON", "AddressSanitizer",
    ),
}  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_is_killed(prefix: Path, tmp_path: Path, mutant: str) -> None:
    file, right, wrong, sanitizer, said = MUTANTS[mutant]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / file).read_text()
    assert text.count(right) == 1
    (csrc / file).write_text(text.replace(right, wrong))
    sources = [csrc / source for source in WITHOUT_TORCH]
    flags = ["-std=c++20", "-O1", "-g", "-pthread", "-fno-sanitize-recover=all", *FLAGS[sanitizer], "-I", csrc]
    command("c++", *flags, *sources, "-o", tmp_path / "tests")
    done = subprocess.run([tmp_path / "tests", TRACES], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr, done.stdout + done.stderr
