"""`flowfast rewards`."""

from __future__ import annotations

from flowfast import rewards
from flowfast.cli.shown import print_names


def command() -> None:
    """The rewards that search can raise, a line each."""
    print_names(rewards.available())
