"""Tables in Markdown, for table.md, the terminal and the README."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

HEAD = ("method", "path", "budget", "NFE", "s / prompt", "given reward", "held-out", "held-out minus best-of-n")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table whose columns line up in plain text too."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in [head, *rows]]
    lines.insert(1, ["-" * width for width in widths])
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def comparison_rows(rows: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The rows of results.json as text, in the columns of HEAD."""
    return [
        [
            row["method"],
            row["interpolant"],
            f"{row['budget']} NFE" if row["budget"] is not None else f"{row['seconds']:g} s",
            f"{row['nfe']:.0f}",
            f"{row['seconds_per_prompt']:.2f}",
            interval(row["reward"], ".2f"),
            interval(row["heldout"], ".3f"),
            interval(row["difference"] and row["difference"]["heldout"], "+.3f"),
        ]
        for row in rows
    ]


def overview(rows: Sequence[dict[str, Any]]) -> str:
    """One row a method and path, one column an amount: the held-out score where there is one, else the reward."""
    amounts = list(dict.fromkeys((row["budget"], row["seconds"]) for row in rows))
    head = ["method", "path", *(f"{b} NFE" if b is not None else f"{s:g} s" for b, s in amounts)]
    what = "reward" if rows[0]["heldout"] is None else "heldout"
    cells: dict[tuple[str, str], dict[tuple[Any, Any], str]] = {}
    for row in rows:
        cells.setdefault((row["method"], row["interpolant"]), {})[row["budget"], row["seconds"]] = interval(
            row[what], ".2f"
        )
    return markdown(head, [[*arm, *(found.get(amount, "") for amount in amounts)] for arm, found in cells.items()])


def interval(value: dict[str, float] | None, form: str) -> str:
    """ "0.41 [0.35, 0.47]"; "" for None."""
    return "" if value is None else f"{value['mean']:{form}} [{value['low']:{form}}, {value['high']:{form}}]"
