"""Bounds of the numbers that users give: what lies outside is refused with both ends named, NaN always.

steps: Annotated[int | None, Within(1, 10_000)] = None
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError
from pydantic_core import PydanticCustomError, core_schema

from flowfast import secrets
from flowfast.errors import BudgetError, FlowfastError, OptionError
from flowfast.prompts.fields import MOST_DIGITS, show

_FAR = 1e15
MOST_ROWS = 65_536
"""Slots, chains, lanes, rows of a micro-batch, samples kept: more of any is a slip of the keyboard."""


@dataclass(frozen=True)
class Within:
    """A number from low to high, both allowed unless `above`: then low itself is not. True and False are no numbers."""

    low: float
    high: float
    above: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return core_schema.no_info_wrap_validator_function(self.check, handler(source))

    def check(self, value: Any, handler: Callable[[Any], Any]) -> Any:
        if isinstance(value, bool):
            raise PydanticCustomError("number", "expected a number")
        with contextlib.suppress(TypeError, AttributeError):
            value = operator.index(value)  # whole numbers of other libraries, too large for pydantic
        if isinstance(value, int) and value.bit_length() > MOST_DIGITS * 3.3219:
            raise PydanticCustomError("digits", "must have at most {most} digits", {"most": MOST_DIGITS})
        found = handler(value)
        if found is None or (self.low <= found <= self.high and not (self.above and found == self.low)):
            return found
        low = f"above {_plain(self.low)} and at most" if self.above else f"in {_plain(self.low)} .."
        raise PydanticCustomError("bounds", "must be {low} {high}", {"low": low, "high": _plain(self.high)})


@dataclass(frozen=True)
class Whole:
    """Any whole number that Python writes out. True and False are no numbers."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        return Within(float("-inf"), float("inf")).__get_pydantic_core_schema__(source, handler)


def ends(bounds: Within) -> str:
    """ "1 .. 65,536", "above 0, at most 100"; an end so far out that nobody meets it is left out."""
    low, high = (_plain(end) if abs(end) < _FAR else "" for end in (bounds.low, bounds.high))
    if low and high and not bounds.above:
        return f"{low} .. {high}"
    return ", ".join(
        [f"{'above' if bounds.above else 'at least'} {low}"] * bool(low) + [f"at most {high}"] * bool(high)
    )


def _plain(bound: float) -> str:
    return f"{bound:,.0f}" if abs(bound) < _FAR and bound == int(bound) else f"{bound:g}"


def refused(error: ValidationError, what: str = "option") -> FlowfastError:
    """One line for the first thing that a validation found: the name, what was expected, what came."""
    first = error.errors()[0]
    kind = BudgetError if first["loc"][:1] in (("budget",), ("seconds",)) else OptionError
    given = first["input"]
    name, came = ".".join(str(part) for part in first["loc"]), show(given) if type(given) is int else repr(given)
    came = secrets.without_login(came)
    if first["loc"][:1] in (("model_options",), ("model",), ("reward",)):  # a secret that no name gives away?
        came = type(first["input"]).__name__
    message = first["msg"][:1].lower() + first["msg"][1:]
    return kind(f"{what} {name!r}: {message}, got {came if len(came) <= 80 else came[:77] + '...'}")
