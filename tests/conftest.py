"""One thread unless a test asks for more: small tensors gain nothing from a second one, and two threads on a busy
core wait for each other.

Files that compile or take long come first, the builds before what measures time: `make test` hands files to its two
workers in this order, so that both end at about the same time."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests import cpp

torch.set_num_threads(1)


TESTS = Path(__file__).resolve().parent
FIRST = (
    "runner/test_flowfast_run.py", "test_cuda_build.py", "test_sanitize.py", "ops/test_triton.py",
    "runner/test_server.py", "test_evidence.py", "cli/test_generate.py", "archive/test_archive.py", "test_bench.py",
    "models/test_diffusers.py", "cli/test_files.py", "cli/test_kills.py", "cli/test_cookbook.py",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {TESTS / name: i for i, name in enumerate(FIRST)}
    if missing := [str(path) for path in place if not path.exists()]:
        raise pytest.UsageError(f"tests/conftest.py: FIRST names what is not there: {', '.join(missing)}")
    items.sort(key=lambda item: place.get(item.path, len(place)))  # stable


def pytest_collection_finish() -> None:
    """What is there by now, torch and thousands of tests, is no garbage: a search that runs out of memory collects it,
    and would look through all of that each time, half a second long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The installed C++ runner."""
    return cpp.install()
