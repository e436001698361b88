"""`flowfast models`."""

from __future__ import annotations

from flowfast import api
from flowfast.cli.shown import print_names


def command() -> None:
    """The flow models, a line each."""
    print_names(api.MODELS)
