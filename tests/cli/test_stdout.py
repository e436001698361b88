"""What is printed goes into pipes that close, full disks, terminals without letters."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest

from flowfast import cli
from tests.cli.conftest import Run
from tests.cli.test_kills import CALL


@pytest.mark.parametrize(
    ("shell", "code", "says"),
    [
        ("{} methods | true; exit ${{PIPESTATUS[0]}}", 1, ""),
        ("{} methods | head -1 > /dev/null", 0, ""),
        ("{} methods >&-", 0, ""),
        ("{} methods > /dev/full", 2, "flowfast: No space left on device\n"),
        ("{} best 2>&-", 2, ""),
        ("{} $'g\\xff'", 2, "flowfast: No such command 'g\\udcff'.\n"),
        ("LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {} methods > /dev/null", 0, ""),
    ],
)
def test_output_that_nobody_reads(shell: str, code: int, says: str) -> None:
    command = shell.format(f"{sys.executable} -m flowfast.cli")
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, says)


def test_letters_that_a_terminal_does_not_know(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert cli.main([*CALL, "--out", str(tmp_path / "Stra\u00dfe")]) == 0
    ascii_only.seek(0)
    assert "Stra\\xdfe/00-two-red-circles" in ascii_only.read()
