"""Without a cluster, or without Ray: one line that says what to do, soon."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from flowfast.errors import OptionError
from flowfast.ray import cluster
from flowfast.ray.cluster import as_ours, connected, last_line


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody.invalid:6379"])
def test_a_cluster_that_is_not_there(address: str) -> None:
    started = time.monotonic()
    with pytest.raises(OptionError, match="cannot reach a Ray cluster at .*ray start --head"), connected(address):
        pass
    assert time.monotonic() - started < cluster.REACH_SECONDS + 5


@pytest.mark.parametrize("address", ["somewhere", "host:port", "", "1.2.3.4"])
def test_an_address_that_is_none(address: str) -> None:
    with pytest.raises(OptionError, match="expected local, auto, HOST:PORT"), connected(address):
        pass


def test_without_the_extra_it_is_named(tmp_path: Path) -> None:
    code = "import sys; sys.modules['ray'] = None; from flowfast.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "generate",
        "two red circles",
        "--ray",
        "local",
        "--out",
        str(tmp_path / "o"),
    ]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    assert found.returncode == 2
    assert found.stderr == "flowfast: flowfast.ray needs ray: pip install 'flowfast[ray]'\n"


def test_an_error_of_ours_is_found_in_rays() -> None:
    text = "The actor died\n  File x\nflowfast.errors.WeightError: its weights are damaged\n"
    found = as_ours(RuntimeError(text))
    assert type(found).__name__ == "WeightError" and str(found) == "its weights are damaged"
    other = as_ours(RuntimeError("one\ntwo\n"))
    assert isinstance(other, OptionError) and str(other).endswith("RuntimeError: two")
    assert last_line(ValueError("")) == "ValueError"
