"""One thread unless a test asks for more: small tensors gain nothing from a second one, and two threads on a busy
core wait for each other."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch

from tests import cpp

torch.set_num_threads(1)


def pytest_collection_finish() -> None:
    """What is there by now, torch and thousands of tests, is no garbage: a search that runs out of memory collects it,
    and would look through all of that each time, half a second long."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The installed C++ runner."""
    return cpp.install()
