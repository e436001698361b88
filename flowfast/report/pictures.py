"""The pictures: a search (search.png), methods side by side (contact.png), and what a budget buys (curve.png)."""

from __future__ import annotations

import io
import math
import textwrap
import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from flowfast.types import Candidate, Sample

COLOURS = {
    "ode": "#7f7f7f",
    "bon": "#000000",
    "sop": "#8c564b",
    "smc": "#9467bd",
    "code": "#2ca02c",
    "svdd": "#1f77b4",
    "rbf": "#d62728",
    "rbf-official": "#ff7f0e",
}
LINES = ("-", "--", ":", "-.")
GOOD, BAD = "#1a7f37", "#c62828"


def search_picture(
    sample: Sample, path: Sequence[tuple[float, Tensor]], candidates: Sequence[Candidate], heldout: float | None
) -> bytes:
    """PNG: posterior means along the winner's path above, the reward of every candidate against NFE below."""
    columns = min(len(path), 12)
    shown = [path[round(i * (len(path) - 1) / max(1, columns - 1))] for i in range(columns)]
    figure = Figure(figsize=(max(8.0, 1.15 * columns), 5.2), layout="constrained")
    grid = figure.add_gridspec(2, columns, height_ratios=(1, 2.4))
    for column, (t, image) in enumerate(shown):
        axes = figure.add_subplot(grid[0, column])
        _show(axes, _array(image))
        axes.set_title(f"t = {t:.2f}", fontsize=9)
    axes = figure.add_subplot(grid[1, :])
    scored = [(c, c.reward) for c in candidates if c.reward is not None and math.isfinite(c.reward)]
    kinds = (
        ([each for each in scored if not each[0].finished], "posterior mean on the way", "#9db7d5", 10),
        ([each for each in scored if each[0].finished], "finished sample", "#d62728", 18),
    )
    for of_kind, label, colour, size in kinds:
        if of_kind:
            axes.scatter([c.nfe for c, _ in of_kind], [r for _, r in of_kind], s=size, c=colour, label=label, lw=0)
    best = np.maximum.accumulate([r if c.finished else -np.inf for c, r in scored]) if scored else np.zeros(0)
    if np.isfinite(best).any():
        at = dict(zip((c.nfe for c, _ in scored), np.where(np.isfinite(best), best, np.nan), strict=True))
        axes.step(list(at), list(at.values()), "k", where="post", marker="_", ms=9, label="best so far")
    if unscored := [c.nfe for c in candidates if c.reward is None]:  # at the foot: they have no value
        foot = axes.get_xaxis_transform()
        axes.plot(unscored, [0.015] * len(unscored), "|", color="#9a9a9a", ms=5, transform=foot, label="not scored")
    axes.set_xlabel("NFE (rows through the model)")
    axes.set_ylabel("reward" if sample.top[0].preview_reward is None else "reward of previews")
    if axes.get_legend_handles_labels()[0]:  # no reward may be finite
        axes.legend(loc="best", fontsize=8, framealpha=0.9)
    axes.spines[["top", "right"]].set_visible(False)
    verdict = "" if heldout is None else f", held-out verifier {heldout:g}"
    prompt = _wrapped(sample.prompt, int(11 * figure.get_figwidth()), 3)
    figure.suptitle(f"{prompt}\n{sample.method}, {sample.nfe} NFE: reward {sample.reward:.3g}{verdict}", fontsize=11)
    return png(figure)


def contact_picture(
    prompts: Sequence[str],
    columns: Sequence[str],
    cells: Sequence[Sequence[tuple[np.ndarray, float, float | None] | None]],
) -> bytes:
    """PNG: rows = prompts, columns = arms; a cell is (image (H, W, 3) bytes, given reward, held-out score)."""
    width = 2.3 + 1.35 * len(columns)
    figure = Figure(figsize=(width, 0.9 + 1.55 * len(prompts)), layout=ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.03))
    grid = figure.add_gridspec(len(prompts), len(columns) + 1, width_ratios=[1.7] + [1] * len(columns))
    for row, prompt in enumerate(prompts):
        label = figure.add_subplot(grid[row, 0])
        label.axis("off")
        label.text(1.0, 0.5, _wrapped(prompt, 22, 7), ha="right", va="center", fontsize=9, transform=label.transAxes)
        for column, name in enumerate(columns):
            axes = figure.add_subplot(grid[row, column + 1])
            if row == 0:
                axes.set_title(name, fontsize=10, fontweight="bold")
            cell = cells[row][column]
            if cell is None:
                axes.axis("off")
                continue
            image, reward, heldout = cell
            _show(axes, image)
            right = heldout is not None and heldout >= 0.5
            mark = "" if heldout is None else (" \u2713" if right else " \u2717")
            axes.set_xlabel(
                f"{reward:.2f}{mark}", fontsize=9, color="black" if heldout is None else GOOD if right else BAD
            )
            for spine in axes.spines.values():
                spine.set(visible=True, color=axes.xaxis.label.get_color(), linewidth=1.6)
    figure.supxlabel("number: the given reward, which search raised; mark and frame: the held-out verifier", fontsize=9)
    return png(figure)


def base_of(method: str) -> str:
    """The method of an arm without its gradient: "rbf" of "rbf+dps:1"."""
    return method.partition("+")[0]


def curve_picture(rows: Sequence[dict[str, Any]], what: str = "heldout") -> bytes:
    """PNG: `what` ("heldout" or "reward") of every method against NFE and against seconds, with 95 % intervals.

    rows: those of results.json. On the right stand the arms whose budget was given in seconds; where there are none,
    the time that the budgets in NFE took. Points of one budget are set a little apart to tell their intervals apart;
    "ode", which has no budget, is a level line.
    """
    figure = Figure(figsize=(11.5, 4.8), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    paths = list(dict.fromkeys(row["interpolant"] for row in rows))
    kinds = list(dict.fromkeys((row["method"], row["interpolant"]) for row in rows))
    strokes = list(dict.fromkeys((path, method.partition("+")[2]) for method, path in kinds))  # a method has one colour
    timed = any(row["budget"] is None for row in rows)
    for number, (method, path) in enumerate(kinds):
        own = [r for r in rows if (r["method"], r["interpolant"]) == (method, path) and r[what] is not None]
        counted = sorted((r for r in own if r["budget"] is not None), key=lambda r: r["budget"])
        right = sorted((r for r in own if r["budget"] is None), key=lambda r: r["seconds"]) if timed else counted
        if method == "ode":
            for axes in panels:
                level = [own[0][what][end] for end in ("mean", "low", "high")] if own else [math.nan] * 3
                axes.axhline(level[0], color=COLOURS["ode"], ls=":", label="one plain sample (ode)")
                axes.axhspan(level[1], level[2], color=COLOURS["ode"], alpha=0.12, lw=0)
            continue
        name = f"{method} ({path})" if len(paths) > 1 else method
        stroke = LINES[strokes.index((path, method.partition("+")[2])) % len(LINES)]
        style = {"color": COLOURS.get(base_of(method)), "linestyle": stroke, "label": name}
        apart = 1.02 ** (number - (len(kinds) - 1) / 2)
        for axes, shown, x in zip(panels, (counted, right), ("nfe", "seconds_per_prompt"), strict=True):
            _errorbar(axes, shown, [row[x] * apart for row in shown], what, style)
    panels[0].set_xlabel("NFE a prompt (rows through the model)")
    panels[1].set_xlabel("seconds a prompt (measured, prompts in batches)")
    panels[0].set_ylabel({"heldout": "share of prompts right (held-out verifier)", "reward": "given reward"}[what])
    panels[0].set_title("equal NFE", fontsize=11)
    panels[1].set_title("equal seconds" if timed else "the same runs by their time", fontsize=11)
    budgets = sorted({row["budget"] for row in rows if row["budget"] is not None and base_of(row["method"]) != "ode"})
    for axes, ticks in zip(panels, (budgets, sorted({r["seconds"] for r in rows if r["seconds"]})), strict=True):
        axes.set_xscale("log")
        if ticks:
            axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.xaxis.set_minor_locator(NullLocator())
        else:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.xaxis.set_minor_locator(NullLocator())
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0].get_legend_handles_labels()
    lines = [handle[0] if isinstance(handle, ErrorbarContainer) else handle for handle in handles]
    panels[1].legend(lines, labels, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return png(figure)


def _errorbar(axes: Any, rows: Sequence[dict[str, Any]], x: list[float], what: str, style: dict[str, Any]) -> None:
    middle = np.array([row[what]["mean"] for row in rows])
    low, high = (np.array([row[what][end] for row in rows]) for end in ("low", "high"))
    error = np.stack([middle - low, high - middle]).clip(0)
    axes.errorbar(x, middle, yerr=error, marker="o", capsize=2, markersize=4.5, lw=1.5, elinewidth=0.7, **style)


def _array(image: Tensor) -> np.ndarray:
    """(H, W, 3); of a video the frame in the middle."""
    if image.dim() == 4:
        image = image[len(image) // 2]
    return image.detach().clamp(0, 1).permute(1, 2, 0).cpu().numpy()


def _show(axes: Any, image: np.ndarray) -> None:
    axes.imshow(image, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])


def _wrapped(text: str, width: int, most: int) -> str:
    """A user's text in at most so many lines, without what cannot be drawn at all."""
    words = " ".join(text.split())
    shown = "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in words)
    return "\n".join(textwrap.wrap(shown, width, max_lines=most, placeholder=" \u2026", break_on_hyphens=False))


def png(figure: Figure) -> bytes:
    """The PNG of a figure whose texts are shown as they are."""
    for text in figure.findobj(Text):  # prompts say what they say: "$5" is no formula
        text.set_parse_math(False)
        text.set_usetex(False)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a box is drawn in its place
        FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=130)
    return buffer.getvalue()
