"""What results are written as; every file is there whole or not at all (flowfast/files.py)."""

from __future__ import annotations

import io
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from torch import Tensor

from flowfast.errors import OutputError
from flowfast.files import output_errors, write_bytes


def check_writable(folder: Path) -> None:
    """Raises OutputError unless files can be written into `folder`; leaves nothing behind, the folder included."""
    with output_errors(folder):
        missing = [path for path in [folder, *folder.parents] if not path.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with tempfile.TemporaryFile(dir=folder):
                pass
        finally:
            for path in missing:
                path.rmdir()


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(plain(value), indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, value: dict[str, Any]) -> None:
    write_text(path, yaml.safe_dump(value, sort_keys=False, allow_unicode=True))


def write_picture(path: Path, image: Tensor) -> None:
    """image (3, H, W) in [0, 1] as a PNG of that size."""
    array = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "png")
    write_bytes(path, buffer.getvalue())


def read_picture(path: Path) -> np.ndarray:
    """Bytes (H, W, 3) of a picture."""
    with output_errors(path), Image.open(path) as picture:
        return np.asarray(picture.convert("RGB"))


def plain(value: Any) -> Any:
    """The same for JSON, which knows no NaN and no infinity: those become null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    return value


class Lines:
    """A file of JSON lines that grows. Each `add` reaches the disk's file at once, `sync=True` the disk itself."""

    def __init__(self, path: Path, sync: bool = False) -> None:
        self.path, self.sync = path, sync
        with output_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a", encoding="utf-8")

    def add(self, *values: Any) -> None:
        with output_errors(self.path):
            self._file.write("".join(json.dumps(plain(value), ensure_ascii=False) + "\n" for value in values))
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
        text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]
    if whole != text:
        write_text(path, whole)
    try:
        return [json.loads(line) for line in whole.splitlines()]
    except json.JSONDecodeError as error:
        raise OutputError(f"{path} is damaged ({error}); remove it or choose another --out") from error
