"""The tables and the picture of the study, from its results alone."""

from __future__ import annotations

import io
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.studies.flux_pruning.study import BASELINE, CHOSEN, HELD_OUT, OWN
from flowfast.report.tables import interval, markdown

HEAD = ["selects", "n", "arm", "images (at t)", "cost", "its own verdict", "held-out verdict", "as best of"]
COLOURS = {"ImageReward": "#1f77b4", "PickScore": "#d62728", "HPSv2": "#2ca02c", OWN: "#ff7f0e", CHOSEN: "#9467bd"}


def tables(results: dict[str, Any]) -> str:
    """Markdown: what each arm is worth, and where along t the rewards begin to see."""
    head = ["t", *(f"{t:.2f}".removeprefix("0") for t in results["times"])]
    rho = [[name, *(f"{value:.2f}".replace("0.", ".") for value in of)] for name, of in results["rho"].items()]
    return markdown(HEAD, [cells(row) for row in results["rows"]]) + "\n" + markdown(head, rho)


def cells(row: dict[str, Any]) -> list[str]:
    """A row of HEAD: of best-of-n the value itself, of the others the difference from it."""
    base = row["arm"] == BASELINE
    shown, form = (row["value"], ".3f") if base else (row["difference"], "+.3f")
    later = zip(row["images"][1:], row["times"], strict=True)
    return [
        row["selects"],
        str(row["n"]),
        row["arm"],
        " > ".join([str(row["images"][0]), *(f"{count} ({time:.2f})" for count, time in later)]),
        f"{row['cost']:.1f}",
        interval(shown[row["selects"]], form),
        interval(shown[HELD_OUT], form),
        f"{row['as_good_as']:.1f}",
    ]


def picture(results: dict[str, Any]) -> bytes:
    """PNG: rank correlations along t, and by the reward that selects the gain over best-of-n at equal cost."""
    figure = Figure(figsize=(13.5, 4), layout="constrained")
    names = list(results["rho"])
    first = figure.add_subplot(1, 1 + len(names), 1)
    for name, values in results["rho"].items():
        first.plot(results["times"], values, marker="o", markersize=3, color=COLOURS[name], label=name)
    first.set(xlim=(1.03, 0.05), ylim=(0, 1.02), xlabel="t of the posterior mean (1 is noise)")
    first.set_title("rank correlation with the final reward", fontsize=10)
    first.legend(fontsize=8, frameon=False)
    panels: list[Axes] = []
    for place, name in enumerate(names, 2):
        panels.append(figure.add_subplot(1, 1 + len(names), place, sharey=panels[0] if panels else None))
        gains(panels[-1], [row for row in results["rows"] if row["selects"] == name])
        panels[-1].set_title(f"{name} selects", fontsize=10)
    panels[0].set_ylabel("gain over best-of-n, within-prompt sd")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower right", ncols=4, fontsize=9, frameon=False)
    for axes in (first, *panels):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=110)
    return buffer.getvalue()


def gains(axes: Axes, rows: list[dict[str, Any]]) -> None:
    """One panel: each arm by the reward that selects and by those held out, beside each other at each n."""
    numbers = sorted({row["n"] for row in rows})
    kinds = [(arm, verdict) for arm in (OWN, CHOSEN) for verdict in (rows[0]["selects"], HELD_OUT)]
    for place, (arm, verdict) in enumerate(kinds):
        own = [row["difference"][verdict] for n in numbers for row in rows if (row["n"], row["arm"]) == (n, arm)]
        x = [at + 0.12 * (place - (len(kinds) - 1) / 2) for at in range(len(numbers))]
        middle = [value["mean"] for value in own]
        error = [[v["mean"] - v["low"] for v in own], [v["high"] - v["mean"] for v in own]]
        held = verdict == HELD_OUT
        axes.errorbar(
            x,
            middle,
            yerr=error,
            fmt="s" if held else "o",
            markerfacecolor="white" if held else COLOURS[arm],
            color=COLOURS[arm],
            capsize=2,
            markersize=5,
            label=f"{arm}, {'held-out verdict' if held else 'its own verdict'}",
        )
    axes.axhline(0, color="black", lw=0.8)
    axes.set_xticks(range(len(numbers)), [str(n) for n in numbers])
    axes.set_xlabel("n of best-of-n at the same cost", fontsize=9)
