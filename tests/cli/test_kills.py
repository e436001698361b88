"""What `generate` leaves on disk where it is killed, or where the disk is full: the next call goes on from it."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flowfast import cli
from flowfast.engine import call
from flowfast.errors import OutputError
from flowfast.files import LOCK, PART, locked_folder
from flowfast.report.write import Lines
from tests.cli.conftest import PROMPTS, Run
from tests.cli.test_generate import FAST, folders

CALL = ("generate", *PROMPTS[:3], *FAST, "--method", "rbf", "--seed", "4", "--micro-batch", "4")


def files_of(out: Path) -> dict[str, Any]:
    """All files, those with seconds in them by name only."""
    found = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        found[name] = path.is_dir() or path.name == "timing.json" or path.read_bytes()
    return found


def in_child(work: Callable[[], int]) -> int:
    """The exit code of `work` in a fork of this process, minus the signal that killed it."""
    child = os.fork()
    if not child:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        code = 99
        try:
            code = work()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dies_at(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """SIGKILL at the count-th time that a file is synced, renamed, linked or removed, or a line is added."""
    left = [count]

    def counted(real: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*given, **named)

        return call

    for name in ("fsync", "replace", "unlink", "link"):
        monkeypatch.setattr(os, name, counted(getattr(os, name)))
    monkeypatch.setattr(Lines, "add", counted(Lines.add))


@pytest.mark.parametrize("stride", [3, 8, 21, 34])
def test_kills_at_any_file_operation_leave_the_files_of_a_call_that_was_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    run(*CALL, "--out", tmp_path / "whole")
    out, kills, operations = tmp_path / "out", 0, stride
    while True:
        resumes = (out / "call.yaml").exists()
        argv = ["generate", "--resume", out] if resumes else [*CALL, "--out", out]

        def work(argv: list[Any] = argv, operations: int = operations) -> int:
            dies_at(operations, monkeypatch)
            return cli.main([str(word) for word in argv])

        code = in_child(work)
        if code == 0:
            break
        assert code == -signal.SIGKILL
        kills += 1
        operations += 1 + operations // 8  # or a search that begins anew would never end
    assert kills >= 3
    assert files_of(out) == files_of(tmp_path / "whole")


def kill_at_random_times(run: Run, tmp_path: Path, kills: int) -> None:
    start = time.monotonic()
    run(*CALL, "--out", tmp_path / "whole")
    whole, rng, done = time.monotonic() - start, random.Random(39), 0
    out = tmp_path / "out"
    for _ in range(10 * kills):
        argv = ["generate", "--resume", out] if (out / "call.yaml").exists() else [*CALL, "--out", out]
        child = os.fork()
        if not child:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            os._exit(cli.main([str(word) for word in argv]))
        start, ended = time.monotonic(), (0, 0)
        dies = start + rng.uniform(0, whole)
        while done < kills and time.monotonic() < dies and not ended[0]:
            time.sleep(0.005)
            ended = os.waitpid(child, os.WNOHANG)
        if not ended[0]:
            if done < kills:
                os.kill(child, signal.SIGKILL)
            ended = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(ended[1])
        if code == 0:
            whole = min(whole, time.monotonic() - start)  # the first one had imports to do
        done += code < 0
        if code == 0 and done < kills:
            assert files_of(out) == files_of(tmp_path / "whole")
            out = out.with_name(out.name + "+")
        elif code == 0:
            break
        assert code in (0, -signal.SIGKILL)
    assert done == kills
    assert files_of(out) == files_of(tmp_path / "whole")


def test_kills_at_random_times(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    kill_at_random_times(run, tmp_path, 4)


@pytest.mark.slow
def test_39_kills_at_random_times(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    kill_at_random_times(run, tmp_path, 39)


@pytest.mark.parametrize("limit", [200, 3_000, 8_000, 30_000])
def test_a_full_disk_is_one_line_and_the_call_goes_on_when_it_is_not(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """A limit on the size of files stands for it: call.yaml, a picture, the checkpoint do not fit."""
    monkeypatch.setattr(call, "CHECKPOINT_SECONDS", 0.0)
    run(*CALL, "--out", tmp_path / "whole")
    out = tmp_path / "out"

    def fills() -> int:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return cli.main([*CALL, "--out", str(out)])

    run.capfd.readouterr()
    assert in_child(fills) == 2
    said = run.capfd.readouterr().err
    assert said.startswith("flowfast: cannot write ") and said.count("\n") == 1 and "File too large" in said
    assert not [path for path in tmp_path.rglob("*") if PART in path.name or path.name == LOCK]
    run("generate", "--resume", out) if (out / "call.yaml").exists() else run(*CALL, "--out", out)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_what_a_killed_process_left_half_written_is_swept_and_nothing_else(run: Run, tmp_path: Path) -> None:
    run(*CALL, "--out", tmp_path)
    before, place = files_of(tmp_path), folders(tmp_path)[1]
    (tmp_path / LOCK).write_text("process 1 on elsewhere")
    mine = {place / f".result.json.12345678{PART}.json", tmp_path / f".call.yaml.abcdefgh{PART}.yaml"}
    others = {place / ".hidden", place / "notes.part", tmp_path / ".result.json.12345678"}
    for path in mine | others:
        path.write_text("half")
    run(*CALL, "--out", tmp_path)
    assert files_of(tmp_path) == before | {str(path.relative_to(tmp_path)): b"half" for path in others}


def test_a_lock_dies_with_its_process(tmp_path: Path) -> None:
    def dies() -> int:
        with locked_folder(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)
        return 0

    assert in_child(dies) == -signal.SIGKILL
    assert (tmp_path / LOCK).exists()
    with (
        locked_folder(tmp_path),
        pytest.raises(OutputError, match=f"process {os.getpid()} on"),
        locked_folder(tmp_path),
    ):
        pass
    assert not (tmp_path / LOCK).exists()
