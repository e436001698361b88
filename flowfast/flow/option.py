"""Options written as text: a name and numbers, `name:1:2.5`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

from flowfast.errors import OptionError

T = TypeVar("T")


def parse_numbers(kind: str, text: str, parts: list[str]) -> list[float]:
    """The numbers in `parts`; OptionError names the whole option `text` when one of them is not a finite number."""
    numbers = []
    for part in parts:
        try:
            number = float(part)
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise OptionError(f"{kind} {text!r}: expected a finite number, got {part!r}; write it like 0.5")
        numbers.append(number)
    return numbers


def parse_option(kind: str, text: str, classes: Mapping[str, type[T]]) -> T:
    """Build the dataclass registered under the name in `text`, its fields filled in order: `vp:0.1:20`.

    Raises OptionError for an unknown name (it lists the valid ones), for anything but finite numbers, and for more
    numbers than the class has fields; the class itself checks their range.
    """
    name, *parts = str(text).split(":")
    if name not in classes:
        raise OptionError(f"unknown {kind} {name!r}; choose one of: {', '.join(classes)}")
    fields = [field.name for field in dataclasses.fields(classes[name]) if field.init]  # type: ignore[arg-type]
    if len(parts) > len(fields):
        expected = ", ".join(fields) if fields else "no numbers"
        raise OptionError(f"{kind} {text!r} has {len(parts)} numbers; {name} takes {expected}")
    return classes[name](*parse_numbers(kind, text, parts))
