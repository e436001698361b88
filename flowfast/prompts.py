"""Prompts with fields, and the files they come from: a prompt a line, or JSONL.

A line of JSONL is an object with `prompt` and, where they are known, `classes` and `counts` (what a counting reward
looks for), `text` (what an OCR reward reads) and `seed` (of this prompt's noise). Other fields are left alone, so
lists made for other programs run as they are.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowfast.errors import OptionError, PromptError

KINDS: dict[str, tuple[type, type | None]] = {
    "classes": (list, str), "counts": (list, int), "text": (str, None), "seed": (int, None),
}  # fmt: skip


class Prompt(str):
    """A text that carries fields along: wherever a text will do, so does a prompt."""

    fields: dict[str, Any]

    def __new__(cls, text: str, /, **fields: Any) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.fields = check_fields(text, fields)
        return prompt

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:  # for copies and other processes
        return (str(self),), self.fields

    def as_entry(self) -> str | dict[str, Any]:
        """For a config.yaml: the text, or the object that `prompt_of` takes."""
        return {"prompt": str(self), **self.fields} if self.fields else str(self)


def fields_of(prompt: str) -> dict[str, Any]:
    """Fields of a prompt; none of a plain text."""
    return getattr(prompt, "fields", {})


def check_fields(text: str, fields: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not None. Raises PromptError for unknown names and wrong types."""
    known = {name: value for name, value in fields.items() if value is not None}
    for name, value in known.items():
        if name not in KINDS:
            raise PromptError(f"prompt {text!r}: unknown field {name!r}; choose of {', '.join(KINDS)}")
        kind, inner = KINDS[name]
        right = isinstance(value, kind) and not isinstance(value, bool)
        if not right or (inner is not None and not all(isinstance(entry, inner) for entry in value)):
            expected = f"a list of {inner.__name__}" if inner else kind.__name__
            raise PromptError(f"prompt {text!r}: field {name!r} must be {expected}, got {value!r}")
    if len(known.get("classes", [])) != len(known.get("counts", known.get("classes", []))):
        raise PromptError(
            f"prompt {text!r}: expected as many counts as classes, got {known['counts']} for {known['classes']}"
        )
    return known


def prompt_of(entry: Any, where: str) -> str:
    """A prompt from a text or an object of a file. Raises PromptError, naming `where`."""
    if isinstance(entry, str):
        return entry
    text = entry.get("prompt") if isinstance(entry, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise PromptError(f'{where}: expected an object with a text under "prompt", got {entry!r}')
    try:
        return Prompt(text, **{name: entry.get(name) for name in KINDS})
    except PromptError as error:
        raise PromptError(f"{where}: {error}") from None


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file; .jsonl or .json where its lines are JSON. Raises OptionError, PromptError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise OptionError(f"cannot read --prompts {path}: {error}") from None
    found: list[str] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if path.suffix not in (".jsonl", ".json"):
            found.append(line.strip())
            continue
        try:
            entry = json.loads(line)
        except json.JSONDecodeError as error:
            raise PromptError(f"{path}, line {number}: not JSON ({error}); write an object a line") from None
        found.append(prompt_of(entry, f"{path}, line {number}"))
    if not found:
        raise PromptError(f"--prompts {path} has no prompt: write one a line")
    return found
