"""The picture of a calibration: where its reward begins to see, and what plans would find."""

from __future__ import annotations

import math
from collections.abc import Mapping

from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from flowfast.calibration.bank import BLIND, Bank
from flowfast.calibration.choose import Choice, Chosen, is_default
from flowfast.report.pictures import LINES, png

PATHS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#8c564b")
BON, DEFAULT, TAKEN = "best-of-n", "prune, its default", "what auto takes"
STYLES = {BON: ("#000000", "o"), DEFAULT: ("#1f77b4", "s"), TAKEN: ("#d62728", "^")}


def calibration_picture(bank: Bank, chosen: Mapping[int, Chosen]) -> bytes:
    """PNG: rank correlation along t on the left, expected reward against NFE on the right. chosen: by budget."""
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, path in enumerate(bank.paths):
        name = f"path {number + 1}: {path.nfe} NFE" + " (the model's own)" * (number == 0)
        style = {"color": PATHS[number % len(PATHS)], "ls": LINES[number % len(LINES)], "label": name}
        left.plot(path.linear_times, path.rho, marker="o", ms=4, **style)
    left.axhline(BLIND, color="#777777", lw=0.8, ls=":")
    left.text(0.0, BLIND + 0.01, f"below {BLIND:g} nothing is cut", fontsize=8, color="#555555", ha="right")
    left.set_xlim(1.02, -0.02)
    left.set_xlabel("linear t of the posterior mean (1 is noise)")
    left.set_ylabel("rank correlation with the final reward")
    left.set_title("where the reward begins to see", fontsize=11)
    left.legend(loc="lower right", fontsize=8)
    for name, of_budget in lines_of(chosen).items():
        colour, marker = STYLES[name]
        right.plot(list(of_budget), list(of_budget.values()), marker, ls="-", color=colour, label=name, ms=4, lw=1.2)
    right.set_xscale("log")
    ticks = sorted({budget for budget in chosen})
    right.set_xticks(ticks[:: max(1, math.ceil(len(ticks) / 8))])
    right.xaxis.set_minor_locator(NullLocator())
    right.xaxis.set_major_formatter(StrMethodFormatter("{x:.0f}"))
    right.set_xlabel("NFE a prompt")
    right.set_ylabel("expected reward")
    right.set_title("what plans would find, replayed on the bank", fontsize=11)
    right.legend(loc="lower right", fontsize=8)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, lw=0.6)
    P, n, _ = bank.paths[0].rewards.shape
    figure.suptitle(f"{bank.model} with reward {bank.reward}: {P} prompts, {n} trajectories each", fontsize=12)
    return png(figure)


def lines_of(chosen: Mapping[int, Chosen]) -> dict[str, dict[int, float]]:
    """Expected rewards by budget, of best-of-n and of prune's default on the model's own path, and of what is taken."""
    found: dict[str, dict[int, float]] = {name: {} for name in STYLES}
    for budget, each in chosen.items():
        own = [choice for choice in each.choices if choice.route == 0]
        for name, fitting in (
            (BON, [choice for choice in own if not choice.cuts]),
            (DEFAULT, [choice for choice in own if is_default(choice)]),
            (TAKEN, [each.taken]),
        ):
            if fitting:
                found[name][budget] = fitting[0].mean
    return {name: of_budget for name, of_budget in found.items() if of_budget}


HEAD = ("NFE", "takes", "expected reward", "prune's default", "best-of-n")


def calibration_rows(bank: Bank, chosen: Mapping[int, Chosen]) -> tuple[tuple[str, ...], list[list[str]]]:
    """Head and rows of a table of what budgets take."""
    lines = lines_of(chosen)
    rows = []
    for budget, each in chosen.items():
        numbers = [lines.get(name, {}).get(budget) for name in (TAKEN, DEFAULT, BON)]
        taken = f"path {each.taken.route + 1}: " * (len(bank.paths) > 1) + told(each.taken)
        rows.append([str(budget), taken, *("" if each is None else f"{each:.3f}" for each in numbers)])
    return HEAD, rows


def told(choice: Choice) -> str:
    """ "prune 22 > 9 > 3": how many chains are alive."""
    return f"{choice.method.name} {' > '.join(map(str, dict.fromkeys(choice.counts)))}"
