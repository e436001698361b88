"""The command line, a file a command. Every error that a user can cause is one line on stderr and exit code 2."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from flowfast import secrets
from flowfast.cli import (
    bench,
    calibrate,
    compare,
    explain,
    export,
    generate,
    info,
    methods,
    models,
    reward_server,
    rewards,
    serve,
)
from flowfast.errors import FlowfastError
from flowfast.memory import keep_memory
from flowfast.version import __version__

LONGEST_ERROR = 1000
COMMANDS: dict[str, Callable[..., None]] = {
    "generate": generate.command,
    "compare": compare.command,
    "calibrate": calibrate.command,
    "explain": explain.command,
    "export": export.command,
    "serve": serve.command,
    "reward-server": reward_server.command,
    "info": info.command,
    "methods": methods.command,
    "rewards": rewards.command,
    "models": models.command,
}
app = typer.Typer(
    name="flowfast",
    help="Better samples from a flow model: search over its noise with a reward, within a fixed budget.",
    add_completion=False,
    pretty_exceptions_enable=False,
)
for name, command in COMMANDS.items():
    app.command(name)(command)
app.add_typer(bench.app, name="bench")


def version(value: bool) -> None:
    """Prints the version and ends, where --version is given."""
    if value:
        print(f"flowfast {__version__}")
        raise typer.Exit


@app.callback()
def common(
    _version: Annotated[bool, typer.Option("--version", callback=version, is_eager=True, help="Print it.")] = False,
) -> None:
    """Options before the command."""


def main(argv: list[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, 2 for an error of the user's, 130 for Ctrl-C."""
    keep_memory()
    secrets.forget()  # those of an earlier call in this process
    argv = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may not know the letters of a folder's name
    try:
        code = app(argv, prog_name="flowfast", standalone_mode=False) or 0
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except BrokenPipeError:  # `| head` has read enough
        _drop_stdout()
        return 1
    except typer.Abort:
        return 130
    except (FlowfastError, typer.TyperException, OSError) as error:
        message = error.format_message() if isinstance(error, typer.TyperException) else str(error)
        if isinstance(error, OSError):
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror or message
            _drop_stdout()  # it may be this that cannot be written to
        line = " ".join(secrets.hidden(message).split())
        line = line if len(line) <= LONGEST_ERROR else f"{line[:700]} ... {line[-250:]}"
        print(f"flowfast: {line}", file=sys.stderr)
        return 2


def _drop_stdout() -> None:
    """What is still to be written there goes nowhere, instead of into an error as Python ends."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
