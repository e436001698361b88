"""What results are written as; every file is there whole or not at all (flowfast/files.py)."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from flowfast.errors import OutputError
from flowfast.files import output_errors, plain, replacing, write_bytes

log = logging.getLogger("flowfast.report")


def check_places(folders: Iterable[Path], names: Iterable[str]) -> None:
    """Raises OutputError where a folder is to be and something else is, or a folder where one of its files is to be."""
    names = list(names)
    for folder in folders:
        if os.path.lexists(folder) and not folder.is_dir():
            raise OutputError(f"cannot write into {folder}: it is not a folder; move it, or choose another --out")
        for path in (folder / name for name in names):
            if path.is_dir():
                raise OutputError(f"cannot write {path}: it is a folder; move it, or choose another --out")


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        """Values that are one object are written out each time: aliases are not read back."""
        return True


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    write_text(path, yaml.dump(value, Dumper=_Plain, sort_keys=False, allow_unicode=True))


LARGE = 2**16
"""Bytes of a file from which on many copies of it are one file on the disk: an edit in place would change them all."""


def write_same(path: Path, other: Path) -> None:
    """Puts what is at `other` at `path` too: a copy, of a large file a hard link where the file system can."""
    if other.stat().st_size >= LARGE:
        with contextlib.suppress(OutputError), replacing(path) as temporary:
            temporary.unlink()
            os.link(other, temporary)
            return
    write_bytes(path, other.read_bytes())


def write_picture(path: Path, image: Tensor) -> None:
    """image (3, H, W) in [0, 1] as a PNG of that size."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    write_bytes(path, buffer.getvalue())


def drawn(path: Path, write: Callable[[], Any], again: str) -> bool:
    """Writes a picture. One that fails is a line of warning and False: it takes no other file with it. again: the
    command that tries it once more. Raises OutputError."""
    try:
        write()
    except OutputError:
        raise
    except Exception as error:
        why = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        log.warning("%s was not drawn (%s); `%s` tries it again", path, why, again)
        return False
    return True


def read_picture(path: Path) -> np.ndarray | None:
    """Bytes (H, W, 3) of a picture; None where it is not there any more, or damaged."""
    try:
        with Image.open(path) as picture:
            return np.asarray(picture.convert("RGB"))
    except Exception as error:  # Pillow has many, SyntaxError among them
        log.warning("%s cannot be read (%s): its place stays empty", path, " ".join(str(error).split()))
        return None


def json_line(value: Any) -> str:
    return json.dumps(plain(value), ensure_ascii=False, allow_nan=False) + "\n"


def number(value: Any) -> float:
    """What `plain` made of a number."""
    return math.nan if value is None else float(value)


class Lines:
    """A file of JSON lines that grows. Each `add` reaches the disk's file at once, `sync=True` the disk itself."""

    def __init__(self, path: Path, sync: bool = False) -> None:
        self.path, self.sync = path, sync
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def add(self, *values: Any) -> None:
        with output_errors(self.path):
            self._file.write("".join(map(json_line, values)))
            self._file.flush()
            if self.sync:
                os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_lines(path: Path) -> list[Any]:
    """The whole JSON lines of a file; a last line that a crash cut short is taken off the file. No file: no lines."""
    if not path.exists():
        return []
    with output_errors(path):
        data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        write_bytes(path, whole)
    found = []
    for count, line in enumerate(whole.split(b"\n")[:-1], 1):  # texts may hold what splitlines takes for an end
        try:
            found.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise damaged(path, count, error) from None
    return found


def damaged(path: Path, line: int, error: Exception) -> OutputError:
    return OutputError(f"{path}, line {line}, is damaged ({error}); remove the file or choose another --out")
