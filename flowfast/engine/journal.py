"""What an engine was asked and what it told, one line an entry, so that an engine that was killed knows its requests.

Each line is `digest JSON`, appended and synced before `add_request` or `abort` return. A line that a kill cut short is
the last one and never counted; any other damage is an error that says how much is intact. Entries of requests that have
ended are dropped when they are most of the file, so that what is written grows with the work.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from flowfast.errors import OptionError
from flowfast.files import output_errors, write_bytes

FORMAT = 1
SMALL = 1 << 16
"""Bytes up to which nothing is dropped."""


class Journal:
    """The journal at `path`, which must be locked. `entries`: those that were there, of requests that have not ended,
    by id."""

    def __init__(self, path: Path, entries: dict[str, dict[str, Any]] | None = None):
        """entries None: a new one, which takes the place of any other."""
        self.path, self.live = path, dict(entries or {})
        self._write_whole()

    def add(self, request: dict[str, Any]) -> None:
        self.live[request["id"]] = request
        self._append({"add": request})

    def end(self, *ids: str) -> None:
        """These were aborted, or their last event was told."""
        known = [each for each in ids if self.live.pop(each, None) is not None]
        if known:
            self._append({"end": known})
        if self.size > max(SMALL, 2 * self.whole):
            self._write_whole()

    def _append(self, entry: dict[str, Any]) -> None:
        data = line_of(entry)
        with output_errors(self.path), self.path.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.size += len(data)

    def _write_whole(self) -> None:
        data = line_of({"format": FORMAT}) + b"".join(line_of({"add": request}) for request in self.live.values())
        write_bytes(self.path, data)
        self.size = self.whole = len(data)


def line_of(entry: dict[str, Any]) -> bytes:
    text = json.dumps(entry, allow_nan=False).encode()
    return digest(text) + b" " + text + b"\n"


def digest(text: bytes) -> bytes:
    return hashlib.blake2b(text, digest_size=8).hexdigest().encode()


def read_journal(path: Path) -> dict[str, dict[str, Any]]:
    """The requests that had not ended, by id, in their order. Raises OptionError: it is damaged, or no journal."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise OptionError(f"cannot read the journal {path}: {error.strerror or error}") from None
    lines = data.split(b"\n")[:-1]  # behind the last one stands nothing, or what a kill cut short
    live: dict[str, dict[str, Any]] = {}
    for count, line in enumerate(lines):
        seal, _, text = line.partition(b" ")
        if seal != digest(text):
            raise refused(path, f"line {count + 1} of {len(lines)} is damaged", live)
        entry = json.loads(text)
        if count == 0:
            if entry.get("format") != FORMAT:
                raise refused(path, f"it is no journal of format {FORMAT}", live)
        elif "add" in entry:
            live[entry["add"]["id"]] = entry["add"]
        else:
            for each in entry["end"]:
                live.pop(each, None)
    if not lines:
        raise refused(path, "it is empty", live)
    return live


def refused(path: Path, why: str, live: dict[str, dict[str, Any]]) -> OptionError:
    open_ones = f"; before that, {len(live)} requests had not ended: {', '.join(list(live)[:5])}" if live else ""
    return OptionError(
        f"cannot restore from {path}: {why}{open_ones}; remove it and its snapshot to start anew, and ask again"
    )
