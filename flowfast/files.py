"""Files that are there whole or not at all: written beside their place, synced, then renamed into it. And locks, so
that two processes never write to one place."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import math
import os
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowfast.errors import OutputError

PART = ".flowfast-part"
"""In the names of files that are not whole yet; each is locked by the process that writes it."""
LOCK = ".flowfast-lock"


@contextlib.contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turns an OSError on `path` into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"cannot write {path}: {error.strerror or error}; choose another --out or free the disk"
        ) from error


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary file that takes the place of `path` at the end, making its folder. A reader or a crash sees the old
    file or the new one, whole. Its name ends as that of `path` does."""
    with output_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        ending = path.suffix if len(path.suffix) < 16 else ""
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:64]}.", suffix=PART + ending)
        try:
            _lock(descriptor)
            yield Path(name)
            os.fsync(descriptor)
            os.chmod(name, 0o644)
            os.replace(name, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise
        finally:
            os.close(descriptor)


def write_bytes(path: Path, data: bytes) -> None:
    """Puts `data` at `path`, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_bytes(data)


def sweep(folder: Path, name: str = "") -> None:
    """Removes what killed processes left half-written in `folder`, of files whose names begin with `name`."""
    for found in glob.glob(f".{glob.escape(name[:64])}*{PART}*", root_dir=folder):
        with contextlib.suppress(OSError), (folder / found).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # fails where its writer lives
            (folder / found).unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Makes `folder` this call's own. Where it was made for this and stays empty, it is removed again.

    Raises OutputError: it cannot be written to, or another call holds it, which is named.
    """
    with _locked(folder / LOCK, folder):
        sweep(folder)
        yield


@contextlib.contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """Makes the file at `path` this call's own, as `locked_folder` does for a folder."""
    with output_errors(path):  # its name may be too long
        found = path.exists() and not path.is_file()
    if found:
        raise OutputError(f"cannot write {path}: it is not a file; choose another name")
    with _locked(path.with_name(f".{path.name[:64]}{LOCK}"), path):
        sweep(path.parent, path.name)
        yield


@contextlib.contextmanager
def _locked(lock: Path, what: Path) -> Iterator[None]:
    missing: list[Path] = []
    try:
        with output_errors(what):
            missing += [folder for folder in lock.parents if not folder.exists()]
            lock.parent.mkdir(parents=True, exist_ok=True)
            held = _take(lock, what)
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()
            os.close(held)
    finally:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()


def _take(lock: Path, what: Path) -> int:
    """The descriptor that holds `lock`. The lock itself is the system's, so it dies with its process; the file says
    whose it is. Raises OutputError where another holds it."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o644)
        if not _lock(descriptor):
            holder = os.read(descriptor, 256).decode(errors="replace").strip() or "it has just begun"
            os.close(descriptor)
            raise OutputError(
                f"{what} is in use by another flowfast ({holder}): wait for it to end, or choose another place"
            )
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                break
        os.close(descriptor)  # the one before has removed the file: lock the next one
    os.ftruncate(descriptor, 0)
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    os.write(descriptor, f"process {os.getpid()} on {platform.node()}, since {now}\n".encode())
    return descriptor


def _lock(descriptor: int) -> bool:
    """False where another holds it; a file system that knows no locks has none to give."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def plain(value: Any) -> Any:
    """The same for JSON, which knows no infinity and no NaN: the one becomes "inf" or "-inf", the other null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value
