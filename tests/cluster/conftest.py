"""One small cluster of this machine for all tests of a file, which leaves nothing behind."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import psutil
import pytest
import ray

from flowfast.ray.cluster import NAMESPACE


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    before = raylets()
    os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 (Ray's own 15 leaves actors little of a busy machine)
    for left in (2, 1, 0):
        try:
            ray.init(
                num_cpus=2,
                object_store_memory=100 * 2**20,
                include_dashboard=False,
                log_to_driver=False,
                namespace=NAMESPACE,
            )
            break
        except Exception:  # Ray gives its daemons 30 s, which a busy machine may not
            ray.shutdown()
            if not left:
                raise
    yield
    ray.shutdown()
    until = time.monotonic() + 30
    while raylets() - before and time.monotonic() < until:
        time.sleep(0.1)
    assert raylets() <= before


def raylets() -> set[int]:
    """Daemons of Ray that this process has started."""
    return {each.pid for each in psutil.Process().children(recursive=True) if each.name() in ("raylet", "gcs_server")}
