"""What an engine was asked and what it told, one line an entry, so that an engine that was killed knows its requests.

Each line is `digest JSON`, appended and synced before `add_request` or `abort` return; its digest is also one of all
lines before, so that none can be lost or moved. A line that a kill cut short is the last one and never counted; any
other damage is an error that says how much is intact. Entries of requests that have ended are dropped when they are
most of the file, so that what is written grows with the work.
"""

from __future__ import annotations

import hashlib
import json
import os
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flowfast.errors import OptionError
from flowfast.files import output_errors, write_bytes

FORMAT = 1
SMALL = 1 << 16
"""Bytes up to which nothing is dropped."""


@dataclass
class Known:
    """What a journal says."""

    engine: str = field(default_factory=lambda: uuid.uuid4().hex)
    """Whose it is: a restored engine is the same one."""
    live: dict[int, dict[str, Any]] = field(default_factory=dict)
    """Requests that have not ended, by number, in their order."""
    entries: int = 0
    """That were ever made."""
    next: int = 0
    """The first number that no request ever had."""

    def note(self, entry: dict[str, Any]) -> None:
        """An entry was made."""
        self.entries += 1
        if "add" in entry:
            number = entry["add"]["number"]
            self.live[number], self.next = entry["add"], max(self.next, number + 1)
        else:
            for number in entry["end"]:
                self.live.pop(number, None)


class Journal:
    """The journal at `path`, which must be locked."""

    def __init__(self, path: Path, known: Known):
        """Takes the place of any other."""
        self.path, self.known = path, known
        self.size, self.whole, self.seal = 0, 0, b""
        self._write_whole()

    def add(self, request: dict[str, Any]) -> None:
        self._append({"add": request})

    def end(self, numbers: list[int]) -> None:
        """These were aborted, or their last event was told."""
        ended = [number for number in numbers if number in self.known.live]
        if ended:
            self._append({"end": ended})
        if self.size > max(SMALL, 2 * self.whole):
            self._write_whole()

    def _append(self, entry: dict[str, Any]) -> None:
        data, seal = line_of(entry, self.seal)
        with output_errors(self.path), self.path.open("r+b") as file:
            file.seek(self.size)  # over what a full disk may have cut short
            file.write(data)
            file.truncate()
            file.flush()
            os.fsync(file.fileno())
        self.size, self.seal = self.size + len(data), seal
        self.known.note(entry)

    def _write_whole(self) -> None:
        known = self.known
        head: dict[str, Any] = {"format": FORMAT, "engine": known.engine, "entries": known.entries, "next": known.next}
        entries: list[dict[str, Any]] = [{"add": request} for request in known.live.values()]
        lines, seal = list[bytes](), b""
        for entry in [{**head, "live": len(entries)}, *entries]:
            line, seal = line_of(entry, seal)
            lines.append(line)
        data = b"".join(lines)
        write_bytes(self.path, data)
        self.size = self.whole = len(data)
        self.seal = seal


def line_of(entry: dict[str, Any], before: bytes) -> tuple[bytes, bytes]:
    """Of an entry behind a line with this digest, and its own digest."""
    text = json.dumps(entry, allow_nan=False).encode()
    seal = digest(text, before)
    return seal + b" " + text + b"\n", seal


def digest(text: bytes, before: bytes) -> bytes:
    return hashlib.blake2b(before + text, digest_size=16).hexdigest().encode()


def read_journal(path: Path) -> Known:
    """Raises OptionError: it is damaged, or no journal."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"cannot read the journal {path}: {error.strerror or error}") from None
    lines = data.split(b"\n")[:-1]  # behind the last one stands nothing, or what a kill cut short
    known, seal, made_before = Known(), b"", 1
    for count, line in enumerate(lines):
        found, _, text = line.partition(b" ")
        if found != digest(text, seal):
            raise refused(path, f"line {count + 1} of {len(lines)} is damaged", known)
        seal, entry = found, json.loads(text)
        if count:
            known.note(entry)
        elif entry.get("format") != FORMAT:
            raise refused(path, f"it is no journal of format {FORMAT}", known)
        else:
            known = Known(entry["engine"], {}, entry["entries"] - entry["live"], entry["next"])
            made_before += entry["live"]
    if len(lines) < made_before:
        raise refused(path, "it is cut off" if lines else "it is empty", known)
    return known


def refused(path: Path, why: str, known: Known) -> OptionError:
    ids = [request["id"] for request in known.live.values()]
    before = f"; before that, {len(ids)} requests had not ended: {', '.join(ids[:5])}" if ids else ""
    dots = ", ..." if len(ids) > 5 else ""
    return OptionError(
        f"cannot restore from {path}: {why}{before}{dots}; remove it and its snapshot to start anew, and ask again"
    )
