"""Lists of prompts: one reader for every command, and the same rules in csrc/runner (tests/prompt_lists.json has cases
that both read).

A list is a file, a folder, or "-", standard input. Bytes are UTF-8 with or without BOM, or UTF-16 with one; anything
else is refused with the place of the first byte that is wrong. Line ends are LF, CRLF or CR. The kind is the suffix, in
any case, and what is inside:

    .txt, .text, .lst, .list    a prompt a line; blank lines are none
    .jsonl, .ndjson, .json      JSON: values a line, where the first line is one; else one document: a list of texts or
                                objects, an object by id of texts or of objects, an object with a list under "prompts"
                                or another of these names, or with nothing but one list, or one object with a prompt
    .csv, .tsv                  a table whose first row names the columns, separated by what the suffix says, or by the
                                one of comma, tab and semicolon that gives a column we know. A field in double quotes
                                may hold separators, line ends and, doubled, quotes; quotes that do not enclose a whole
                                field belong to it (so has PartiPrompts them)
    a folder                    its .txt files by name, each one prompt; hidden files are none
    no suffix, standard input   by what is inside: JSON, a table with a column we know, else a prompt a line
    another suffix              the same, but never a prompt a line

A .txt that begins like JSON ({" or [" or [{) or whose first row is that of a table (several columns, one of which we
know) is read as such; one whose first line is nothing but the name of a column has no prompt in that line. A line that
begins like a JSON object, among lines that do not, is refused.

The prompt is in the column (or member of objects) that --prompt-column names, else in the first there is of prompt,
prompts, caption, captions, text, texts, in any case, else in the only one; in a table that has one space at most in its
name, or it is taken for a prompt without a row of names above it and refused. Of a list of objects the first decides,
and all others must have it. Rows of a table have as many fields as the first. Of rows one after the other with the same
`item_id` and the same prompt (DPG-Bench: one a question) the first is read. What fields a prompt has beside it:
flowfast/prompts/fields.py. White space around prompts of lines, tables and folders is taken off, as str.strip() has it.

What is wrong is named as "FILE, line N, field 'NAME'", in a JSON document as "FILE, entry N" or "FILE, entry 'ID'".
"""

from __future__ import annotations

import codecs
import contextlib
import json
import os
import re
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowfast.errors import OptionError, PromptError
from flowfast.prompts.fields import FIELDS, fault_of, make_prompt, show, without_seed

COLUMNS = ("prompt", "prompts", "caption", "captions", "text", "texts")
HOLDERS = ("data", "rows", "examples", "items", "entries")
"""Members of an object whose list is what a document is for, where it has no other."""
LINES, JSON, TABLE = "lines", "JSON", "table"
KINDS = {
    ".txt": LINES, ".text": LINES, ".lst": LINES, ".list": LINES, ".jsonl": JSON, ".ndjson": JSON, ".json": JSON,
    ".csv": TABLE, ".tsv": TABLE,
}  # fmt: skip
SEPARATORS = {".csv": ",\t;", ".tsv": "\t,;"}
"""Of a table, in the order they are tried."""
BINARY = {
    b"PK\x03\x04": "a zip file (.xlsx, .docx, ...)", b"\x1f\x8b": "a gzip file", b"PAR1": "a Parquet file",
    b"%PDF": "a PDF", b"\x89PNG": "a PNG", b"\xff\xd8\xff": "a JPEG", b"\xff\xfe\0\0": "UTF-32",
    b"\0\0\xfe\xff": "UTF-32", b"\x28\xb5\x2f\xfd": "a zstd file", b"\xfd7zXZ": "an xz file",
    b"\xd0\xcf\x11\xe0": "an old Office file (.xls, .doc, ...)",
    b"version https://git-lfs": "a pointer of Git LFS (`git lfs pull` gets the list)",
    b"<!DOCTYPE html": "a page of HTML", b"<!doctype html": "a page of HTML", b"<html": "a page of HTML",
}  # fmt: skip
MOST_BYTES = 1 << 30
LIST_LINES = 50
"""More lines than one prompt has: a file of a folder that has them is a list itself."""
LIKE_JSON = re.compile(r"\s*(?:\{\s*[\"'}]|\[\s*[{\"\]])")
OBJECT_LINE = re.compile(r"^[ \t]*\{[ \t]*[\"']", re.MULTILINE)


def check_no_lists(texts: Sequence[str]) -> None:
    """Raises PromptError for a prompt that is the name of a list: the shell made several words of --prompts *.txt."""
    for text in texts:
        if text == "-" or (Path(text).suffix.lower() in KINDS and os.path.isfile(text)):
            raise PromptError(f"{show(text)} is a list, not a prompt: give it as --prompts {text}, one option for each")


def read_lists(places: Sequence[Path | str], column: str | None = None, seeds: bool = True) -> list[str]:
    """The prompts of several lists, one after the other; without their own seeds where the caller varies the seed.
    Raises OptionError, PromptError."""
    found = [prompt for place in places for prompt in read_prompts(place, column)]
    return found if seeds else [without_seed(prompt) for prompt in found]


def read_prompts(place: Path | str, column: str | None = None) -> list[str]:
    """The prompts of one list, as the module says. column: `--prompt-column`. Raises OptionError: it cannot be read, or
    has no such column; PromptError: what is in it is no list of prompts."""
    path = Path(place)
    if not str(place):
        raise OptionError("cannot read --prompts '': expected a file or a folder, got an empty name")
    try:
        if str(place) != "-" and path.is_dir():
            return _folder(path)
        data = _bytes(path)
    except OSError as error:
        raise OptionError(f"cannot read --prompts {place}: {error.strerror or error}") from None
    name = "standard input" if str(place) == "-" else str(place)
    suffix = "" if str(place) == "-" else path.suffix.lower()
    found = list(_Reader(name, suffix, _decoded(data, name), column).prompts())
    if not found:
        raise PromptError(f"--prompts {name} has no prompt: write one a line")
    return found


def _bytes(path: Path) -> bytes:
    """Raises OSError, OptionError; PromptError for what is too large."""
    data = bytearray()
    if str(path) == "-" and sys.stdin is None:
        raise OptionError("--prompts -: standard input is closed; give a file, or pipe a list in")
    with contextlib.nullcontext(sys.stdin.buffer) if str(path) == "-" else path.open("rb") as file:
        while part := file.read(1 << 20):
            data += part
            if len(data) > MOST_BYTES:
                raise PromptError(f"--prompts {path} has more than {MOST_BYTES >> 30} GiB: give it in parts")
            if _binary(data):
                break  # it is refused, whatever follows
    return bytes(data)


def _binary(data: bytes | bytearray) -> str | None:
    """What a file is that is no text; None: it may be one."""
    known = next((what for magic, what in BINARY.items() if data.startswith(magic)), None)
    if known is None and not data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and b"\0" in data[:4096]:
        return "a binary file or UTF-16 without a byte-order mark"
    return known


def _decoded(data: bytes, name: str) -> str:
    """The text, with LF as line end. Raises PromptError."""
    what = _binary(data)
    if what:
        raise PromptError(f"{name} is {what}: expected prompts as UTF-8 text (.txt, .jsonl, .json, .csv, .tsv)")
    wide = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        text = data.decode("utf-16" if wide else "utf-8")
    except UnicodeDecodeError as error:
        if wide:
            raise PromptError(f"{name}: UTF-16 is broken at byte {error.start}: save it as UTF-8") from None
        line = len(re.findall(rb"\r\n?|\n", data[: error.start])) + 1
        raise PromptError(
            f"{name}, line {line}: byte 0x{data[error.start]:02x} at offset {error.start} is not UTF-8; save it so, "
            "from Windows by iconv -f WINDOWS-1252 -t UTF-8"
        ) from None
    return text.replace("\r\n", "\n").replace("\r", "\n").replace("\ufeff", "")


def _folder(path: Path) -> list[str]:
    """A prompt a file. Raises PromptError, OSError."""
    files = sorted(file for file in path.iterdir() if file.suffix.lower() == ".txt" and not file.name.startswith("."))
    found = []
    for file in files:
        if file.is_symlink() and not file.exists():
            raise PromptError(f"{file} is a link to what is not there: mend it, or remove it")
        if not file.is_file():
            continue
        text = _decoded(_bytes(file), str(file)).strip()
        lines = text.count("\n") + 1
        if lines > LIST_LINES:
            raise PromptError(
                f"{file} has {lines} lines: in a folder each file is one prompt; give a list as --prompts {file}"
            )
        found.append(_checked(text, str(file)))
    if not found:
        raise PromptError(f"--prompts {path} is a folder without .txt files: expected one for each prompt")
    return found


def _checked(text: str, where: str) -> str:
    fault = fault_of(text)
    if fault:
        raise PromptError(f"{where}: {fault}; write a prompt there, or take it out")
    return text


class Row(NamedTuple):
    """One entry of a list: where it stands, and what it is (a text, an object, or anything else that JSON has)."""

    where: str
    value: Any


class _Reader:
    """One list that was read as `text`."""

    def __init__(self, name: str, suffix: str, text: str, column: str | None) -> None:
        self.name, self.suffix, self.text, self.column = name, suffix, text, column

    def prompts(self) -> Iterator[str]:
        """Raises PromptError, OptionError."""
        kind = KINDS.get(self.suffix)
        if kind == JSON or (kind != TABLE and LIKE_JSON.match(self.text)):
            return self.of_rows(self.json_rows())
        separator = self.separator(SEPARATORS.get(self.suffix, "\t,;"))
        if kind == TABLE or separator:
            return self.of_table(separator or SEPARATORS[self.suffix][0])
        if kind != LINES and self.suffix:
            raise PromptError(
                f"{self.name}: {self.suffix} is no kind of list, and inside is neither JSON nor a table with a column "
                f"{', '.join(COLUMNS[::2])}; name a file with a prompt a line .txt"
            )
        if kind != LINES and self.column:
            raise OptionError(f"--prompt-column {self.column}: {self.name} is no table with such a column")
        return self.of_lines()

    # ---- a prompt a line ----

    def of_lines(self) -> Iterator[str]:
        brace = OBJECT_LINE.search(self.text)
        if brace:
            line = self.text.count("\n", 0, brace.start()) + 1
            raise PromptError(
                f"{self.name}, line {line}: an object of JSON in a list of lines; write all lines as JSON, or none"
            )
        lines = [(number, line.strip()) for number, line in enumerate(self.text.split("\n"), 1) if line.strip()]
        named = bool(lines) and lines[0][1].lower() in COLUMNS[:4]
        for number, prompt in lines[named:]:
            yield _checked(prompt, f"{self.name}, line {number}")

    # ---- tables ----

    def separator(self, choices: str) -> str | None:
        """The first that makes several columns of the first row, with one that we know."""
        for separator in choices:
            _, names = next(_table_rows(self.text, separator), (0, []))
            if len(names) > 1 and self.pick(names, "") is not None:
                return separator
        return None

    def of_table(self, separator: str) -> Iterator[str]:
        rows = _table_rows(self.text, separator)
        first, names = next(rows, (1, []))
        if not names:
            return
        where = f"{self.name}, line {first}"
        names = [name.strip() for name in names]
        only = len(names) == 1 and not self.column and not set(names[0]) & set("\t,;|") and names[0].count(" ") < 2
        column = self.pick(names, where) or (names[0] if only else None)
        if column is None:
            raise self.no_column(names, where)
        read = [name for name in names if name == column or name in FIELDS]
        twice = next((name for name in read if read.count(name) > 1), None)
        if twice:
            raise PromptError(f"{where}, field {twice!r}: there are two columns of that name; rename one")
        last: tuple[Any, str] | None = None
        for number, cells in rows:
            where = f"{self.name}, line {number}"
            while len(cells) > len(names) and not cells[-1]:
                cells.pop()
            if len(cells) != len(names):
                raise PromptError(
                    f"{where}: {len(cells)} fields, but the first row has {len(names)}; put a field with a separator "
                    "in double quotes"
                )
            fields = dict(zip(names, cells, strict=True))
            prompt = _checked(fields.pop(column).strip(), f"{where}, field {column!r}")
            if "item_id" in fields and last == (fields["item_id"], prompt):
                continue
            last = (fields.get("item_id"), prompt)
            yield make_prompt(prompt, fields, where)

    # ---- JSON ----

    def json_rows(self) -> Iterator[Row]:
        lines = [(number, line) for number, line in enumerate(self.text.split("\n"), 1) if line.strip()]
        if not lines:
            return iter(())
        try:
            first = _parsed(lines[0][1])
        except ValueError as error:
            return self.document_rows(self.document(lines[0][0], error))
        if len(lines) == 1:
            return self.document_rows(first)
        return self.line_rows(lines)

    def document(self, first: int, of_line: ValueError) -> Any:
        """The whole text as one value. first, of_line: the first line, and why it is none alone."""
        try:
            return _parsed(self.text)
        except ValueError as error:
            line = getattr(error, "lineno", first)
            if self.suffix in (".jsonl", ".ndjson"):
                error, line = of_line, first
            raise self.not_json(line, error) from None

    def not_json(self, line: int, error: ValueError) -> PromptError:
        reason = getattr(error, "msg", str(error))
        advice = "an object a line" if self.suffix in (".jsonl", ".ndjson") else "a list of texts or objects"
        return PromptError(f"{self.name}, line {line}: not JSON ({reason}); write {advice}")

    def line_rows(self, lines: list[tuple[int, str]]) -> Iterator[Row]:
        for number, line in lines:
            try:
                yield Row(f"{self.name}, line {number}", _parsed(line))
            except ValueError as error:
                raise self.not_json(number, error) from None

    def document_rows(self, value: Any) -> Iterator[Row]:
        value = self.held(value)
        if isinstance(value, list):
            yield from (Row(f"{self.name}, entry {number}", entry) for number, entry in enumerate(value, 1))
        elif isinstance(value, dict):
            column = self.pick(list(value), "")
            if column is not None and not isinstance(value[column], dict):
                yield Row(f"{self.name}, entry 1", value)
                return
            kinds = {type(entry) for entry in value.values()}
            if len(kinds) > 1 or not kinds <= {str, dict}:
                raise PromptError(
                    f"{self.name}: expected an object by id with a text each, or an object each; write a list of "
                    'objects with "prompt"'
                )
            yield from (Row(f"{self.name}, entry {show(key)}", entry) for key, entry in value.items())
        else:
            raise PromptError(f"{self.name}: expected a list of texts or objects, got {show(value)}")

    def held(self, value: Any) -> Any:
        """The list that an object holds; the value itself where it is none that holds a list."""
        if not isinstance(value, dict):
            return value
        lists = [name for name, entry in value.items() if isinstance(entry, list)]
        if "prompts" in lists:
            return value["prompts"]
        column = self.pick(list(value), "")
        one = lists[0] if len(lists) == 1 and column in (None, lists[0]) else None
        return value[one] if one and (one in (column, *HOLDERS) or len(value) == 1) else value

    def of_rows(self, rows: Iterator[Row]) -> Iterator[str]:
        column: str | None = None
        for where, value in rows:
            if isinstance(value, str):
                yield _checked(value, where)
                continue
            if not isinstance(value, dict):
                raise PromptError(f'{where}: expected an object with a text under "prompt", got {show(value)}')
            if column is None:
                only = len(value) == 1 and not self.column
                column = self.pick(list(value), where) or (next(iter(value)) if only else None)
                if column is None:
                    raise self.no_column(list(value), where)
            if column not in value:
                raise PromptError(f"{where}: no field {column!r}, which the first entry has; write the prompt there")
            prompt = _checked(value[column], f"{where}, field {column!r}")
            yield make_prompt(prompt, {name: entry for name, entry in value.items() if name != column}, where)

    # ---- columns ----

    def pick(self, names: Sequence[str], where: str) -> str | None:
        """The column that is asked for, or the first that we know; None: there is none. Raises OptionError where only
        the case tells two apart."""
        for wanted in (self.column,) if self.column else COLUMNS:
            if wanted in names:
                return wanted
            alike = [name for name in names if name.lower() == wanted.lower()]
            if len(alike) > 1 and where:
                raise OptionError(f"{where}: columns {alike[0]!r} and {alike[1]!r}; name one with --prompt-column")
            if alike:
                return alike[0]
        return None

    def no_column(self, names: Sequence[str], where: str) -> OptionError:
        there = ", ".join(show(name) for name in names[:12]) + ", ..." * (len(names) > 12)
        wanted = show(self.column) if self.column else f"one of {', '.join(COLUMNS)}"
        return OptionError(f"{where}: no column {wanted}; name one with --prompt-column of {there or 'none'}")


def _parsed(text: str) -> Any:
    """A value of JSON. Raises ValueError, in one line, also for what nests too deep and for names that come twice."""
    try:
        return _decode(text)
    except RecursionError:
        raise ValueError("nested too deep") from None
    except json.JSONDecodeError:
        raise
    except ValueError as error:  # an integer of thousands of digits
        reason = str(error) if str(error).endswith("twice") else "a number has too many digits"
        raise ValueError(reason) from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"{show(name)} stands there twice")
        found[name] = value
    return found


_decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _table_rows(text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """(line, cells) of every row that is not blank."""
    cell = re.compile(rf'[ ]*"([^"]*+(?:""[^"]*+)*+)"[ ]*(?=[{separator}\n]|\Z)|([^{separator}\n]*)')
    cells: list[str] = []
    line, start, place = 1, 1, 0
    while place <= len(text):
        found = cell.match(text, place)
        assert found is not None  # the second choice may be empty
        quoted, plain = found.groups()
        cells.append(plain if quoted is None else quoted.replace('""', '"'))
        line += 0 if quoted is None else quoted.count("\n")
        place = found.end()
        if text[place : place + 1] != separator:
            if len(cells) > 1 or cells[0].strip():
                yield start, cells
            line += 1
            cells, start = [], line
        place += 1
