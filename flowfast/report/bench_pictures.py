"""The pictures of `flowfast bench`: how long requests take, what slots and micro-batch do to their number, and how a
server does under a load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from flowfast.report.pictures import png

PARTS = {"model": "#1f77b4", "decode": "#2ca02c", "reward": "#ff7f0e", "search": "#d62728", "rest": "#b0b0b0"}
REDS = ("#d62728", "#9467bd", "#8c564b", "#e377c2")
BLUES = ("#9ecae1", "#4292c6", "#08519c", "#08306b", "#000000")


def latency_picture(curves: Mapping[str, Sequence[float]], share: Mapping[str, float], title: str) -> bytes:
    """PNG: the share of requests that are done after so many seconds, a line for each of `curves` (seconds by name)
    with its p50, p95 and p99; below it where the time went."""
    figure = Figure(figsize=(8.5, 5.2), layout="constrained")
    axes, bar = figure.subplots(2, 1, height_ratios=(6, 1))
    styles = (("#1f77b4", "-"), ("#ff7f0e", "--"), ("#7f7f7f", "-"))  # two may be the same
    for (name, seconds), (colour, stroke) in zip(curves.items(), styles, strict=False):
        if len(seconds):
            axes.ecdf(1000 * np.asarray(seconds), color=colour, ls=stroke, label=name)
            for percent, mark in ((50, "o"), (95, "s"), (99, "D")):
                axes.plot(1000 * np.percentile(seconds, percent), percent / 100, mark, color=colour, ms=5)
    axes.plot([], [], "ok", ms=5, label="p50")
    axes.plot([], [], "sk", ms=5, label="p95")
    axes.plot([], [], "Dk", ms=5, label="p99")
    axes.set_xlim(left=0)
    axes.set_ylim(0, 1.02)
    axes.set_xlabel("ms from arrival")
    axes.set_ylabel("share of requests")
    axes.grid(alpha=0.25)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    left = 0.0
    for part, amount in share.items():
        bar.barh(0, amount, left=left, color=PARTS[part], label=f"{part} {100 * amount:.0f} %")
        left += amount
    bar.set_xlim(0, max(1.0, left))
    bar.set_yticks([])
    bar.set_xticks([])
    bar.set_title("where the time goes", fontsize=9, loc="left")
    bar.legend(loc="upper center", bbox_to_anchor=(0.5, -0.05), ncols=len(share), frameon=False, fontsize=9)
    for each in (axes, bar):
        each.spines[["top", "right"]].set_visible(False)
    bar.spines[["left", "bottom"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return png(figure)


def throughput_picture(rows: Sequence[dict[str, Any]], best: int, title: str) -> bytes:
    """PNG: requests a second against the micro-batch, a line for each number of slots, and against latency.

    rows: those of bench.json; best: the one that gets a star."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    numbers = sorted({row["slots"] for row in rows})
    for at, slots in enumerate(numbers):
        own = [row for row in rows if row["slots"] == slots]
        colour = BLUES[min(at, len(BLUES) - 1)] if len(numbers) > 1 else BLUES[2]
        rates = [row["requests_per_s"] for row in own]
        style = {"color": colour, "label": f"{slots} slots", "marker": "o", "ms": 5}
        left.plot([row["micro_batch"] for row in own], rates, **style)
        middle = np.array([row["latency_s"]["p50"] for row in own])
        last = np.array([row["latency_s"]["p99"] for row in own])
        right.errorbar(middle, rates, xerr=[np.zeros(len(own)), last - middle], capsize=2, elinewidth=0.7, **style)
        for row in own:
            place = (row["latency_s"]["p50"], row["requests_per_s"])
            right.annotate(str(row["micro_batch"]), place, xytext=(-5, 5), textcoords="offset points", fontsize=8)
    star = rows[best]
    for axes, x in ((left, star["micro_batch"]), (right, star["latency_s"]["p50"])):
        axes.plot(x, star["requests_per_s"], "*", color="#d62728", ms=15, zorder=5, label="best")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_ylim(0, 1.1 * star["requests_per_s"])
    sizes = sorted({row["micro_batch"] for row in rows})
    left.set_xscale("log", base=2)
    left.set_xticks(sizes, [str(size) for size in sizes])
    left.xaxis.set_minor_locator(NullLocator())
    left.set_xlabel("micro-batch: rows of a model call")
    left.set_ylabel("requests a second")
    right.set_xlim(left=0)
    right.set_xlabel("latency in s, p50 to p99 (number: micro-batch)")
    handles, labels = left.get_legend_handles_labels()
    right.legend(handles, labels, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    figure.suptitle(title, fontsize=11)
    return png(figure)


def serve_picture(requests: Sequence[dict[str, Any]], title: str) -> bytes:
    """PNG: the share of requests that have a slot, a partial image, their picture after so many seconds; and each
    request where it was sent, with what it took, a cross where it has no picture.

    requests: those of bench.json."""
    figure = Figure(figsize=(11.5, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    good = [each for each in requests if each["kind"] == "ok"]
    lines = {"latency": ("latency_s", "#1f77b4"), "queue": ("queue_s", "#7f7f7f")}
    lines |= {"first partial": ("first_partial_s", "#ff7f0e")}
    for label, (name, colour) in lines.items():
        seconds = [each[name] for each in good if each[name] is not None]
        if seconds:
            left.ecdf(np.asarray(seconds), color=colour, label=label)
            for percent, mark in ((50, "o"), (95, "s"), (99, "D")):
                left.plot(np.percentile(seconds, percent), percent / 100, mark, color=colour, ms=5)
    left.set_xlim(left=0)
    left.set_ylim(0, 1.02)
    left.set_xlabel("s from when it was sent (circle p50, square p95, diamond p99)")
    left.set_ylabel("share of those that have a picture")
    if good:
        left.legend(loc="lower right", frameon=False, fontsize=9)
    kinds = sorted({each["kind"] for each in requests} - {"ok"})
    for at, kind in enumerate(["ok", *kinds]):
        own = [each for each in requests if each["kind"] == kind]
        style = {"marker": "o" if kind == "ok" else "x", "color": "#1f77b4" if kind == "ok" else REDS[at % len(REDS)]}
        places = ([each["sent_s"] for each in own], [each["latency_s"] for each in own])
        right.scatter(*places, s=14, alpha=0.7, label=f"{kind} ({len(own)})", **style)
    right.set_xlabel("sent, in s")
    right.set_ylabel("answered after s")
    right.set_ylim(bottom=0)
    right.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(title, fontsize=11)
    return png(figure)
