"""`flowfast methods`."""

from __future__ import annotations

from flowfast.cli.shown import print_names
from flowfast.methods import described


def command() -> None:
    """The search methods, a line each."""
    print_names(described())
