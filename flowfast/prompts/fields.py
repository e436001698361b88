"""Prompts with fields. Lists of them are read by flowfast/prompts/lists.py.

Fields are what a reward may know beside the text, and the seed of a prompt's own noise:

    seed               any integer (3, 3.0, "17982163893102248868"): names this prompt's noise, instead of the call's
    classes, counts    what a counting reward looks for: ["cat", "dog"], [3, 1]
    text               what an OCR reward reads: "OPEN" or ["OPEN", "24H"]
    tag, include, exclude
                       GenEval's: include [{"class": "cat", "count": 3, "color": "red"}] is also taken for classes
                       ["red cat"] and counts [3], unless those are given; all three go to `--layout geneval`

A field of a list that cannot be read is a fault of that prompt: it is raised where a reward reads the field
(`field_of`), with file, line and field, and by nobody else, so lists made for other programs run as they are. Only the
seed is read by every search, so there a wrong value refuses the list.
"""

from __future__ import annotations

import copy
import json
import math
import operator
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any, TypeVar, cast

from flowfast.errors import PromptError

T = TypeVar("T")
MOST_DIGITS = 4300
"""Of a number: Python's own limit."""


class Prompt(str):
    """A text that carries fields along: wherever a text will do, so does a prompt."""

    fields: dict[str, Any]
    faults: dict[str, str]
    """Errors of fields that could not be read, by name: for whoever reads them."""

    def __new__(cls, text: str, /, **fields: Any) -> Prompt:
        prompt = super().__new__(cls, text)
        prompt.fields, prompt.faults = _read_fields(fields, f"prompt {show(text)}")
        if prompt.faults:
            raise PromptError(next(iter(prompt.faults.values())))
        return prompt

    def __getnewargs_ex__(self) -> tuple[tuple[str], dict[str, Any]]:  # for copies and other processes
        return (str(self),), self.fields

    def as_entry(self) -> str | dict[str, Any]:
        """For a config.yaml: the text, or the object that `prompt_of` takes."""
        return {"prompt": str(self), **self.fields} if self.fields else str(self)


def fields_of(prompt: str) -> dict[str, Any]:
    """Fields of a prompt that could be read; none of a plain text."""
    return getattr(prompt, "fields", {})


def field_of(prompt: str, name: str) -> Any:
    """One field of a prompt; None: it has none. Raises PromptError where its list has something else there."""
    faults = getattr(prompt, "faults", {})
    if name in faults:
        raise PromptError(faults[name])
    return fields_of(prompt).get(name)


def make_prompt(text: str, fields: dict[str, Any], where: str, faults: Mapping[str, str] = MappingProxyType({})) -> str:
    """A prompt of a list, `where` its file and line: fields that are not ours are left alone, and wrong ones wait for
    who reads them, but for the seed. faults: of those that were found wrong before. Raises PromptError."""
    known, found = _read_fields({name: fields[name] for name in FIELDS if name in fields}, where)
    faults = {**found, **faults}
    if "seed" in faults:
        raise PromptError(faults["seed"])
    if not known and not faults:
        return text
    prompt = str.__new__(Prompt, text)
    prompt.fields, prompt.faults = known, faults
    return prompt


def prompt_of(entry: Any, where: str) -> str:
    """A prompt from a text or from an object with `prompt`, as a config.yaml has it. Raises PromptError, naming
    `where`."""
    text = entry.get("prompt") if isinstance(entry, dict) else entry
    if isinstance(entry, str):
        return entry
    if not isinstance(text, str) or fault_of(text):
        raise PromptError(f'{where}: expected a text, or an object with a text under "prompt", got {show(entry)}')
    return make_prompt(text, entry, where)


def without_seed(prompt: str) -> str:
    """The same prompt, whose noise is of the call's seed."""
    if "seed" in fields_of(prompt):
        prompt = copy.copy(prompt)
        cast(Prompt, prompt).fields = {name: value for name, value in fields_of(prompt).items() if name != "seed"}
    return prompt


def fault_of(prompt: Any) -> str | None:
    """Why a prompt cannot be drawn; None: it can."""
    if not isinstance(prompt, str):
        return f"expected a text, got {show(prompt)}"
    if not prompt.strip():
        return "it is empty"
    if "\0" in prompt:
        return f"it has a NUL character (at {prompt.index(chr(0)) + 1})"
    if not prompt.isascii():
        half = re.search("[\ud800-\udfff]", prompt)
        if half:
            return f"character {half.start() + 1} is half of a pair (U+{ord(half[0]):04X}), no text: write it as UTF-8"
    return None


def faults_of(prompts: Sequence[Any]) -> list[str]:
    """Why prompts cannot be drawn, by their numbers."""
    found = ((number, fault_of(prompt)) for number, prompt in enumerate(prompts, 1))
    return [f"prompt {number} of {len(prompts)}: {fault}" for number, fault in found if fault]


def few_of(faults: Sequence[str]) -> str:
    """The first few of many."""
    return "; ".join(faults[:5]) + f"; and {len(faults) - 5} more" * (len(faults) > 5)


def check_prompts(prompts: Any, empty: bool = False) -> list[str]:
    """The prompts as a list. Raises PromptError for what is no list of texts, and for the first prompt that cannot be
    drawn, by its number. empty: an empty one can."""
    if isinstance(prompts, bytes | Mapping) or not isinstance(prompts, Iterable):
        raise PromptError(f"expected a list of texts as prompts, got {show(prompts)}")
    try:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError as error:  # an array of no dimension
        raise PromptError(f"expected a list of texts as prompts, got {show(prompts)} ({error})") from None
    if not prompts:
        raise PromptError("expected at least one prompt, got none: give a list of texts")
    for number, prompt in enumerate(prompts, 1):
        fault = fault_of(prompt)
        if fault and not (empty and isinstance(prompt, str) and not prompt.strip()):
            raise PromptError(f"prompt {number} of {len(prompts)}: {fault}; write what to draw, or leave it out")
    # A text of another class (an enum's, numpy's) may show as another text: noise and files go by what it is.
    return [prompt if isinstance(prompt, Prompt) else str.__str__(prompt) for prompt in prompts]


def check_each(prompts: Sequence[str], check: Callable[[str], Any]) -> None:
    """Calls check(prompt) for each; a PromptError of it names the number of the prompt, where there are several."""
    for number, prompt in enumerate(prompts, 1):
        try:
            check(prompt)
        except PromptError as error:
            where = f"prompt {number} of {len(prompts)}: " if len(prompts) > 1 else ""
            raise PromptError(f"{where}{error}") from None


def encoded(encode: Callable[[list[str]], T], prompts: list[str]) -> T:
    """encode(prompts); a prompt that is refused is named by its number."""
    try:
        return encode(prompts)
    except PromptError:
        check_each(prompts, lambda prompt: encode([prompt]))
        raise


def show(value: Any) -> str:
    """A value for an error, in a few words."""
    if isinstance(value, str):
        return repr(value if len(value) <= 60 else value[:57] + "...")
    if isinstance(value, int) and value.bit_length() > 200:
        return f"a number of about {int(value.bit_length() * 0.30103)} digits"
    if isinstance(value, int | float) or value is None:
        return repr(value)
    return {"list": "a list", "dict": "an object"}.get(type(value).__name__, type(value).__name__)


# ---- fields ----


def _read_fields(fields: dict[str, Any], where: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Fields that could be read, and the errors of those that could not. Raises PromptError for an unknown name."""
    known: dict[str, Any] = {}
    faults: dict[str, str] = {}
    for name, value in fields.items():
        if name not in FIELDS:
            raise PromptError(f"{where}: unknown field {name!r}; choose of {', '.join(FIELDS)}")
        expected, read = FIELDS[name]
        try:
            found = read(value)
        except (TypeError, ValueError):
            faults[name] = f"{where}: field {name!r} must be {expected}, got {show(value)}"
            continue
        if found is not None:
            known[name] = found
    if "include" in known and not {"classes", "counts"} & (known.keys() | faults.keys()):
        kinds: dict[str, int] = {}
        for entry in known["include"]:
            kind = " ".join(filter(None, (entry.get("color"), entry["class"])))
            kinds[kind] = kinds.get(kind, 0) + entry["count"]
        known |= {"classes": list(kinds), "counts": list(kinds.values())}
    if "classes" in known and "counts" in known and len(known["classes"]) != len(known["counts"]):
        message = f"{where}: field 'counts' must be as many counts as classes, got {len(known['counts'])} for "
        faults["counts"] = message + str(len(known["classes"]))
        del known["counts"]
    return {name: known[name] for name in FIELDS if name in known}, faults  # in one order, whatever the list's


def _integer(value: Any) -> int | None:
    """3, 3.0, "3"; None and "" are none. Raises ValueError, TypeError."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    if isinstance(value, bool):
        raise ValueError
    if isinstance(value, str):
        digits = re.fullmatch(r"([+-]?[0-9]+)(?:\.0*)?", value.strip())
        if not digits or len(digits[1]) > MOST_DIGITS:
            raise ValueError
        return int(digits[1])
    if isinstance(value, float):
        if not math.isfinite(value) or not value.is_integer() or abs(value) > 2**53:  # above: digits were lost
            raise ValueError
        return int(value)
    number = operator.index(value)
    if number.bit_length() > MOST_DIGITS * 3.3219:
        raise ValueError
    return number


def _count(value: Any) -> int:
    number = _integer(value)
    if number is None or number < 0:
        raise ValueError
    return number


def _list(value: Any) -> list[Any] | None:
    """A list, also as JSON in a cell of a table, or the list of the one value; None, "" and [] are none."""
    if isinstance(value, str):
        value = value.strip()
        if value.startswith("["):
            try:
                value = json.loads(value)
            except RecursionError:
                raise ValueError from None
    if value is None or value in ("", []):
        return None
    return list(value) if isinstance(value, list | tuple) else [value]


def _counts(value: Any) -> list[int] | None:
    found = _list(value)
    return None if found is None else [_count(entry) for entry in found]


def _classes(value: Any) -> list[str] | None:
    found = _list(value)
    if found is not None and any(map(fault_of, found)):
        raise ValueError
    if isinstance(value, str) and found is not None and len(found) == 1 and re.search("[,;]", found[0]):
        raise ValueError  # one class, or several?
    return found


def _texts(value: Any) -> str | list[str] | None:
    """One text as it stands, several as a list; a number is what it looks like."""
    try:
        found = _list(value)
    except ValueError:  # "[EXIT" is a text
        found = [value]
    if found is None:
        return None
    if not all(isinstance(entry, str | int | float) and not isinstance(entry, bool) for entry in found):
        raise ValueError
    texts = [str(entry) for entry in found if str(entry).strip()]
    if any(map(fault_of, texts)):
        raise ValueError
    return None if not texts else texts[0] if len(texts) == 1 else texts


def _tag(value: Any) -> str | None:
    if value is not None and not _is_text(value):
        raise ValueError
    return value or None


def _flat(value: Any) -> bool:
    inner = value if isinstance(value, list) else [value]
    return all(_is_text(part) or isinstance(part, int | float | None) for part in inner)


def _is_text(value: Any) -> bool:
    """A text that files can hold; it may be empty."""
    return isinstance(value, str) and (not value.strip() or fault_of(value) is None)


def _objects(value: Any) -> list[dict[str, Any]] | None:
    """GenEval's [{"class": "cat", "count": 3, ...}], other members as they are."""
    found = _list(value)
    if found is None:
        return None
    for entry in found:
        right = isinstance(entry, dict) and isinstance(entry.get("class"), str) and entry["class"].strip()
        if (
            not right
            or not isinstance(entry.get("color"), str | None)
            or not all(map(_flat, [*entry, *entry.values()]))
        ):
            raise ValueError
    return [{**entry, "count": _count(entry.get("count"))} for entry in found]


FIELDS: dict[str, tuple[str, Callable[[Any], Any]]] = {
    "classes": ("a list of texts", _classes),
    "counts": ("a list of whole numbers from 0 on", _counts),
    "text": ("a text or a list of texts", _texts),
    "seed": ("a whole number", _integer),
    "tag": ("a text", _tag),
    "include": ('a list of objects {"class": text, "count": number}', _objects),
    "exclude": ('a list of objects {"class": text, "count": number}', _objects),
}
"""Name: what it must be, and how it is read (None: it is not there)."""
