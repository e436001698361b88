"""Files of results: there whole or not at all, and lines that a crash cut short."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowfast.errors import OutputError
from flowfast.report.write import read_lines, write_bytes


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full disk."""
    path = tmp_path / "result.json"
    write_bytes(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OutputError, match="cannot write .*No space left on device"):
        write_bytes(path, b"new and longer")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]


def test_damaged_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n{"a": 2')
    assert read_lines(path) == [{"a": 1}]
    assert path.read_text() == '{"a": 1}\n'
    path.write_text("{broken}\n")
    with pytest.raises(OutputError, match="is damaged"):
        read_lines(path)


def test_a_line_cut_inside_a_letter_is_taken_off(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"a": "\u00e9"}\n{"a": "\u00e9'.encode()[:-1])
    assert read_lines(path) == [{"a": "\u00e9"}]
