"""What commands show on a terminal: names in two columns, and how far a search is."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table


def print_names(lines: Mapping[str, str]) -> None:
    """Name and text in two columns; the text wraps at the width of the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in lines.items():
        table.add_row(name, text)
    Console(markup=False, highlight=False).print(table)


@contextmanager
def progress() -> Iterator[Any]:
    """A bar on stderr, if that is a terminal; yields advance(done, of, text)."""
    columns: tuple[ProgressColumn, ...] = (TextColumn("{task.description}"), BarColumn())
    columns += (TextColumn("{task.completed:.0f}/{task.total:.0f}"), TimeElapsedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting", total=1)

        def advance(done: int, of: int, text: str) -> None:
            bar.update(task, completed=done, total=of, description=text)

        yield advance


def print_rows(found: list[tuple[float, float | None, int]], folders: list[Path]) -> None:
    """Reward, held-out score and NFE of each prompt, and its folder."""
    from flowfast.report.tables import markdown

    rows = [
        [f"{reward:.3f}", "" if score is None else f"{score:g}", str(nfe), str(folder)]
        for (reward, score, nfe), folder in zip(found, folders, strict=True)
    ]
    print(markdown(("reward", "held-out", "NFE", "folder"), rows))
