"""An archive of `scenes` for the C++ runner."""

from __future__ import annotations

from pathlib import Path

import pytest

import flowfast


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the embedded model: RBF, two slots, micro-batches of 4 rows, up to 200 NFE."""
    path = tmp_path_factory.mktemp("archive") / "scenes.pt"
    flowfast.export(
        flowfast.load("scenes"), path, reward="scenes", method="rbf", budget=200, slots=2, micro_batch=4, model="scenes"
    )
    return path
