"""Fixtures of the benchmark suites (bench/ops, bench/e2e): `suite` collects rows, the end of the run prints and writes
them. `python -m bench` says how to start it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from bench.timing import Options, Suite, table
from flowfast.report.write import write_json


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("flowfast")
    group.addoption("--quick", action="store_true", help="smallest sizes: does everything run?")
    group.addoption("--threads", type=int, default=1)
    group.addoption("--turns", type=int, default=None, help="turns of every candidate instead of each bench's own")
    group.addoption("--public-code", default=os.environ.get("FLOWFAST_PUBLIC_CODE", ""), metavar="FOLDER")
    group.addoption("--results", default="", metavar="FOLDER", help="writes FOLDER/<name>.json")


def pytest_configure(config: pytest.Config) -> None:
    option = config.getoption
    folder = option("--public-code")
    config.stash[_SUITE] = Suite(
        Options(option("--quick"), option("--threads"), option("--turns"), Path(folder) if folder else None)
    )


@pytest.fixture
def suite(request: pytest.FixtureRequest):
    """One number of threads and no gradients, in every benchmark."""
    found = request.config.stash[_SUITE]
    before = torch.get_num_threads()
    torch.set_num_threads(found.options.threads)
    with torch.no_grad():
        yield found
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results, folder = config.stash[_SUITE].results, config.getoption("--results")
    if not results:
        return
    terminalreporter.write_line(table(results))
    for name, result in results.items() if folder else []:
        write_json(Path(folder) / f"{name}.json", result)


_SUITE = pytest.StashKey[Suite]()
