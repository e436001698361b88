"""Archives of `scenes` for the C++ runner, and the server of examples/cpp/server."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import flowfast
from tests.cpp import ROOT, command
from tests.runner.server import ENDLESS, PROGRAM, SLOTS, Server, served


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the embedded model: RBF, two slots, micro-batches of 4 rows, up to 200 NFE."""
    path = tmp_path_factory.mktemp("archive") / "scenes.pt"
    flowfast.export(
        flowfast.load("scenes"), path, reward="scenes", method="rbf", budget=200, slots=2, micro_batch=4, model="scenes"
    )
    return path


@pytest.fixture(scope="session")
def archive(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For the program, which is built as `make server` builds it."""
    deps = ROOT / "build/deps"
    boost = subprocess.run([ROOT / "examples/cpp/server/get_boost.sh", deps], capture_output=True, text=True)
    if boost.returncode != 0:
        pytest.skip(boost.stderr)
    places = f"-DCMAKE_PREFIX_PATH={prefix};{deps}/usr"
    command("cmake", "-S", "examples/cpp/server", "-B", PROGRAM.parent, "-G", "Ninja", places)
    command("cmake", "--build", PROGRAM.parent)
    path = tmp_path_factory.mktemp("archive") / "scenes.pt"
    flow = flowfast.load("scenes")
    flowfast.export(flow, path, reward="scenes", method="rbf", model="scenes", budget=ENDLESS, slots=SLOTS)
    return path


@pytest.fixture(scope="module")
def server(archive: Path) -> Iterator[Server]:
    with served(archive, "--client-seconds", "2") as running:
        yield running
        assert running.process.poll() is None
        assert running.load() == (0, 0)


@pytest.fixture(scope="session")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of damaged weights, of which comes nothing but NaN; its model has a name of its own."""
    path = tmp_path_factory.mktemp("broken") / "broken.pt"
    flow = flowfast.load("scenes")
    for weights in flow.parameters():
        weights.data.fill_(torch.nan)
    flowfast.export(flow, path, reward="scenes", method="rbf", model="ours/scenes 1", budget=ENDLESS, slots=SLOTS)
    return path
