"""One thread unless a test asks for more: small tensors gain nothing from a second one, and two threads on a busy
core wait for each other."""

from pathlib import Path

import pytest
import torch

from tests import cpp

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def prefix() -> Path:
    """The installed C++ runner."""
    return cpp.install()
