"""A connection to a cluster, and what Ray's errors say."""

from __future__ import annotations

import logging
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray

from flowfast import secrets
from flowfast.errors import FlowfastError, OptionError

NAMESPACE = "flowfast"
LOCAL = "local"
REACH_SECONDS = 10.0
"""That a cluster has to answer."""
OBJECT_STORE = 256 * 2**20
"""Bytes of shared memory of a local cluster; what does not fit goes to the disk."""
CONNECTION = re.compile(r"(?:ray://)?(\[[^\]]+\]|[^:/]+):(\d+)")


@contextmanager
def connected(address: str, cpus: int | None = None) -> Iterator[None]:
    """Inside, Ray is there: a cluster of this machine alone, which ends with it ("local", with so many CPUs), the one
    that this machine belongs to ("auto"), or that at HOST:PORT or ray://HOST:PORT. Where a program has connected
    before, that holds, and stays. Raises OptionError: it cannot be reached."""
    if ray.is_initialized():
        yield
        return
    connect(address, cpus)
    try:
        yield
    finally:
        ray.shutdown()


def connect(address: str, cpus: int | None = None) -> None:
    """Raises OptionError."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "logging_level": logging.ERROR}
    if address == LOCAL:
        options |= {"num_cpus": cpus, "object_store_memory": OBJECT_STORE, "include_dashboard": False}
    else:
        check_reachable(address)
    try:
        ray.init(address, **options)
    except Exception as error:  # ConnectionError, RuntimeError, ValueError, grpc's own
        raise OptionError(f"cannot reach a Ray cluster at {address!r}: {last_line(error)}; {HOW}") from None


HOW = "start one (ray start --head) and give its HOST:PORT, or say local"


def check_reachable(address: str) -> None:
    """Raises OptionError where nobody answers at HOST:PORT, which Ray itself would try for minutes."""
    if address == "auto":
        return
    found = CONNECTION.fullmatch(address)
    if not found:
        raise OptionError(f"expected local, auto, HOST:PORT or ray://HOST:PORT of a Ray cluster, got {address!r}")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise OptionError(f"cannot reach a Ray cluster at {address!r}: {error}; {HOW}") from None


def as_ours(error: BaseException) -> FlowfastError:
    """The error of flowfast that one of Ray tells of, else a line of what it says."""
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, FlowfastError):
            return seen
        cause = getattr(seen, "cause", None)
        seen = cause if isinstance(cause, BaseException) else seen.__cause__
    line = last_line(error)
    ours = re.match(r"flowfast\.errors\.(\w+): (.*)", line)
    if ours:
        kind = {each.__name__: each for each in FlowfastError.__subclasses__()}.get(ours[1], FlowfastError)
        return kind(ours[2])
    return OptionError(f"the cluster could not run it: {type(error).__name__}: {line}")


def last_line(error: BaseException) -> str:
    """What a long error of a remote process ends with."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return secrets.hidden(lines[-1][:500] if lines else type(error).__name__)
