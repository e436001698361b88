"""The plots of docs/methods.md: each method's held-out share against its budget, beside best-of-n in the same run.

python -m bench.method_plots --out docs/images/methods

Nothing is run: the figures are those of bench/results/heldout and bench/results/search/heldout.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from flowfast.report.pictures import png
from flowfast.report.write import write_bytes

RESULTS = Path(__file__).resolve().parent / "results"
STUDIES = {"heldout": ("linear", "vp"), "search/heldout": ("base", "fast")}
"""Folders of results, with the paths that a method walked there."""
PLOTS = {
    "bon": "search/heldout", "prune": "search/heldout", "auto": "search/heldout",
    "sop": "heldout", "smc": "heldout", "code": "heldout", "svdd": "heldout", "rbf": "heldout",
}  # fmt: skip
OWN, OTHER, PLAIN = "#3f51b5", "#8a8a8a", "#c62828"
Row = dict[str, Any]


def shares(rows: Sequence[Row], method: str, path: str) -> list[Row]:
    """Of one method on one path at budgets in NFE, those with all seeds, in order."""
    own = [row for row in rows if row["method"] == method and row.get("interpolant", row.get("path")) == path]
    seeds = max((row["seeds"] for row in own), default=0)
    return sorted((row for row in own if row["budget"] and row["heldout"] and row["seeds"] == seeds),
                  key=lambda row: row["budget"])  # fmt: skip


def draw(axes: Axes, rows: Sequence[Row], method: str, paths: Sequence[str]) -> None:
    for name, colour in {"bon": OTHER, method: OWN}.items():
        for path, stroke in zip(paths, ("-", "--"), strict=True):
            if found := shares(rows, name, path):
                middle = [row["heldout"]["mean"] for row in found]
                error = [[row["heldout"]["mean"] - row["heldout"]["low"] for row in found],
                         [row["heldout"]["high"] - row["heldout"]["mean"] for row in found]]  # fmt: skip
                axes.errorbar([row["budget"] for row in found], middle, yerr=error, color=colour, ls=stroke, marker="o",
                              ms=4, capsize=2, elinewidth=0.7, label=f"{name}, {path}")  # fmt: skip
    (plain,) = [row for row in rows if row["method"] == "ode"][:1]
    axes.axhline(plain["heldout"]["mean"], color=PLAIN, ls=":", label="one plain sample")
    axes.axhspan(plain["heldout"]["low"], plain["heldout"]["high"], color=PLAIN, alpha=0.1, lw=0)


def plot(method: str) -> bytes:
    study = PLOTS[method]
    rows = json.loads((RESULTS / study / "results.json").read_text())["rows"]
    figure = Figure(figsize=(5.6, 2.9), layout="constrained", dpi=110)
    axes = figure.subplots()
    draw(axes, rows, method, STUDIES[study])
    axes.set(xscale="log", ylim=(0, 1), xlim=(45, 560), xlabel="NFE a prompt", ylabel="right, held-out verifier")
    axes.set_xticks([50, 100, 200, 500], ["50", "100", "200", "500"])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.method_plots", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("methods"))
    options = parser.parse_args(argv)
    options.out.mkdir(parents=True, exist_ok=True)
    for method in PLOTS:
        write_bytes(options.out / f"{method}.png", plot(method))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
