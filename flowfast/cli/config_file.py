"""What users write as YAML: config.yaml, and the values of --option and --model-option.

A file is bounded before it is read: its bytes, its values, their depth. Aliases, which may unfold to gigabytes, and
keys that stand twice, of which one would win without a word, are refused.
"""

from __future__ import annotations

import codecs
import re
from pathlib import Path
from typing import Any

import yaml

from flowfast import secrets
from flowfast.errors import OptionError
from flowfast.prompts import prompt_of

MOST_BYTES = 64 << 20
MOST_VALUES = 1_000_000
MOST_DEPTH = 32
MOST_DIGITS = 4300  # Python reads no longer number
NUMBER = re.compile(r"[-+]?[.\d][\da-fA-FxXoO_:.+-]*")
WIDE = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
FAST: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(FAST):
    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value[:40]!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_config(path: Path) -> dict[str, Any]:
    """The mapping of a config.yaml, its prompts as a list of texts. Raises OptionError, PromptError."""
    what = f"--config {path}"
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise OptionError(f"cannot read {what}: it has more than {MOST_BYTES >> 20} MiB")
        text = data.decode("utf-16" if data.startswith(WIDE) else "utf-8-sig")
    except OSError as error:
        raise OptionError(f"cannot read {what}: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        raise OptionError(f"cannot read {what}: byte {error.start} is no UTF-8 text; save it as UTF-8") from None
    found = parse_yaml(text, what)
    if not isinstance(found, dict):
        raise OptionError(f"{what}: expected a mapping of options, got {_kind(found)}")
    for name in found:
        if not isinstance(name, str):
            raise OptionError(f"{what}: expected names of options, got {_kind(name)}: put it in quotes")
    for name in ("method_options", "model_options"):
        if not isinstance(found.get(name, {}), dict):
            raise OptionError(f"{what}: expected {name} to be a mapping, got {_kind(found[name])}")
    entries = found.get("prompts") or []
    if not isinstance(entries, list):
        raise OptionError(f"{what}: expected prompts to be a list of texts, got {_kind(entries)}")
    for number, entry in enumerate(entries, 1):
        if not isinstance(entry, str | dict):
            got = f"{_kind(entry)} as entry {number}: put it in quotes"
            raise OptionError(f"{what}: expected prompts to be a list of texts, got {got}")
    return {**found, "prompts": [prompt_of(entry, what) for entry in entries]}


def parse_options(pairs: list[str], option: str = "--option") -> dict[str, Any]:
    """["n=4"] as {"n": 4}. Raises OptionError."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not name.strip():
            got = "no name" if equals else "one without '='"  # and not what: it may be a secret
            raise OptionError(f"{option}: expected NAME=VALUE, got {got}")
        as_text = secrets.is_secret(name) and value.lower() not in ("true", "false", "null")  # "@1e5" is a password
        found[name.strip()] = value if as_text else parse_yaml(value, f"{option} {name.strip()}")
    return found


def parse_yaml(text: str, what: str) -> Any:
    """The one value of a text. Raises OptionError, whose message has nothing of the value, which may be a secret."""
    try:
        _check(text, what)
        loader = _Loader(text)
        try:
            return loader.get_single_data()
        finally:
            loader.dispose()
    except OptionError:
        raise
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" in line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise OptionError(f"cannot read {what}: not YAML, {error.problem}{where}") from None
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, ArithmeticError) as error:
        # What a tag or a date promises and the text behind it does not hold, as !!int x
        kind = type(error).__name__
        raise OptionError(f"cannot read {what}: not YAML, a value is not what it should be ({kind})") from None


def _check(text: str, what: str) -> None:
    """Looks at the parts of a text one by one, before any value is made of them."""
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=FAST)):
        line = event.start_mark.line + 1
        if isinstance(event, yaml.AliasEvent):
            raise OptionError(f"cannot read {what}: an alias (*{event.anchor}) in line {line}: write the value out")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        elif isinstance(event, yaml.ScalarEvent) and (event.tag or not event.style) and _too_long(event.value):
            raise OptionError(f"cannot read {what}: a number of {len(event.value)} digits in line {line}")
        if depth > MOST_DEPTH:
            raise OptionError(f"cannot read {what}: values inside values {depth} deep in line {line}")
        if count > MOST_VALUES:
            raise OptionError(f"cannot read {what}: it has more than {MOST_VALUES} values")


def _too_long(scalar: str) -> bool:
    return len(scalar) > MOST_DIGITS and NUMBER.fullmatch(scalar) is not None


def _kind(value: Any) -> str:
    """What stands there, in the user's words."""
    kinds = {dict: "a mapping", list: "a list", str: "a text", bool: "yes or no", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), f"a {type(value).__name__}")
