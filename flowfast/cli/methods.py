"""`flowfast methods`."""

from __future__ import annotations

import inspect
from typing import Any

from flowfast.cli.shown import print_names
from flowfast.methods import METHODS


def command() -> None:
    """The search methods, a line each."""
    print_names({name: " ".join(paragraph(method).split()) for name, method in sorted(METHODS.items())})


def paragraph(thing: Any) -> str:
    """The first paragraph of a docstring."""
    return (inspect.getdoc(thing) or "").split("\n\n")[0]
