"""What people look at: tables, curves, pictures side by side, and the section of docs/results.md."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

from bench.studies.search_evidence.design import BASELINE, OWN_PATH, Arm
from bench.studies.search_evidence.run import PICTURES, picture_path
from bench.studies.search_evidence.summary import RESAMPLES, Case, Results, goals, lines_of
from flowfast.errors import OutputError
from flowfast.report.pictures import COLOURS, contact_picture
from flowfast.report.tables import interval, markdown
from flowfast.report.write import read_picture, write_bytes, write_json, write_text

COMMANDS = """\
python -m bench.studies.search_evidence --split tuning --out bench/results/search
python -m bench.studies.search_evidence --split heldout --out bench/results/search --docs docs/results.md \\
  --readme README.md
"""
BEGIN, END = "<!-- search_evidence -->\n", "<!-- /search_evidence -->\n"
FRONT = (
    ("one plain sample", Arm("ode", "base")),
    ("best-of-n", Arm("bon", "base")),
    ("`auto`", Arm("auto", "base")),
    ("best-of-n, fast path", Arm("bon", "fast")),
    ("`auto`, fast path", Arm("auto", "fast")),
)
"""The five rows of the README."""
STYLES = {"prune": "#e6a000", "auto": "#d6006c"}
DETAILS = (
    "method", "path", "budget", "NFE", "rewards", "cost, ms", "processor s", "given reward", "held-out",
    "minus best-of-n, equal NFE", "the same, equal cost",
)  # fmt: skip
Line = dict[str, Any]


def write_all(results: Results, tuning: Results | None, folder: Path) -> str:
    """results.json, table.md, curve.png and contact.png in `folder`. Returns what table.md says."""
    lines, claims = lines_of(results), goals(results, tuning)
    study = results.planner.study
    commits = sorted({str(row["commit"]) for row in results.rows})
    head = {
        "split": study.split,
        "prompts": len(study.prompts),
        "seeds": study.seeds,
        "slots": study.slots,
        "micro_batch": study.micro_batch,
        "constants": asdict(results.planner.costs),
        "interval": f"95 %, percentile bootstrap over prompts, {RESAMPLES} resamples, seeds averaged",
        "versions": results.rows[-1]["versions"] if results.rows else None,
        "commits": commits,
    }
    write_json(folder / "results.json", {**head, "goals": claims, "missing": results.missing(), "rows": lines})
    text = tables(results, lines, claims)
    write_text(folder / "table.md", text)
    if any(line["heldout"] for line in lines):
        write_bytes(folder / "curve.png", curves(lines))
    if sheet := contact(results, folder):
        write_bytes(folder / "contact.png", sheet)
    return text


# ---- tables ----


def tables(results: Results, lines: Sequence[Line], claims: Sequence[Line]) -> str:
    """All tables, and what is missing, in Markdown."""
    missing = results.missing()
    absent = [f"- {name}: {why}\n" for name, why in missing.items()]
    parts = [constants(results), goal_table(claims) if results.planner.study.split == "heldout" else ""]
    seeds = results.planner.study.seeds
    parts += [overview(lines, seeds), details(lines, seeds), "Not done yet:\n\n" + "".join(absent) if absent else ""]
    return "\n".join(part for part in parts if part)


def constants(results: Results) -> str:
    study, costs = results.planner.study, results.planner.costs
    return (
        f"{len(study.prompts)} prompts, seeds 0 to {study.seeds - 1}, {study.slots} prompts side by side in "
        f"micro-batches of {study.micro_batch} rows, one thread ({costs.processor}). Cost of a prompt = "
        f"NFE x {costs.model_ms:.3f} ms + rewards x {costs.reward_ms:.3f} ms + decodes x {costs.decode_ms:.4f} ms.\n"
    )


def goal_table(claims: Sequence[Line]) -> str:
    says = {True: "yes", False: "**no**", None: ""}
    body = [
        [each["what"], interval(each["difference"], "+.3f"), each["criterion"], says[each["reached"]]]
        for each in claims
    ]
    return markdown(("held-out share", "difference", "goal", "reached"), body)


def overview(lines: Sequence[Line], seeds: int) -> str:
    """Held-out shares: a row for each arm, a column for each budget."""
    budgets = sorted({line["budget"] for line in lines if line["method"] != "ode"})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for line in lines:
        cells.setdefault((line["method"], line["path"]), {})[line["budget"]] = share(line, seeds)
    head = ("method", "path", *(f"{budget} NFE" for budget in budgets))
    return markdown(head, [[*arm, *(found.get(budget, "") for budget in budgets)] for arm, found in cells.items()])


def share(line: Line, seeds: int, form: str = ".3f") -> str:
    """The held-out share; where not all seeds are done, of how many."""
    some = f" (seeds: {line['seeds']} of {seeds})" if 0 < line["seeds"] < seeds else ""
    return interval(line["heldout"], form) + some


def details(lines: Sequence[Line], seeds: int) -> str:
    """What every arm spent and found, and its differences from best-of-n."""
    body = []
    for line in lines:
        body.append(
            [
                line["method"],
                line["path"],
                str(line["budget"]),
                *(shown(line[name], form) for name, form in (("nfe", ".0f"), ("rewards", ".0f"), ("cost_ms", ".0f"))),
                shown(line["cpu_seconds"], ".2f"),
                interval(line["reward"], ".2f"),
                share(line, seeds),
                interval(line["difference"] and line["difference"]["heldout"], "+.3f"),
                at_cost(line),
            ]
        )
    return markdown(DETAILS, body)


def at_cost(line: Line) -> str:
    """The difference at equal cost, and the budget that has it."""
    cheap = line["at_cost"]
    if cheap is None or cheap["difference"]["heldout"] is None:
        return ""
    how = "the same run" if cheap["budget"] == line["budget"] else f"{cheap['budget']} NFE"
    return f"{interval(cheap['difference']['heldout'], '+.3f')} ({how})"


def shown(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


# ---- pictures ----


def curves(lines: Sequence[Line]) -> bytes:
    """PNG: held-out share against NFE above and against cost below; the base and the noisy paths left, the fast path
    right, each where it has rows."""
    titles = {False: "base path, and the noisy paths of the literature", True: "fast path"}
    found = {fast: [line for line in lines if (line["path"] == "fast") == fast and line["heldout"]] for fast in titles}
    found = {fast: own for fast, own in found.items() if own}
    figure = Figure(figsize=(2 + 5.5 * len(found), 9), layout="constrained")
    panels = figure.subplots(2, len(found), sharey=True, squeeze=False)
    for column, (fast, own) in enumerate(found.items()):
        for row, x in enumerate(("nfe", "cost_ms")):
            draw(panels[row, column], own, x)
        panels[0, column].set_title(titles[fast])
        panels[0, column].set_xlabel("NFE a prompt")
        panels[1, column].set_xlabel("cost a prompt, ms (rows, rewards and decodes at their measured times)")
    for row in range(2):
        panels[row, 0].set_ylabel("share of prompts right (held-out verifier)")
    handles: dict[str, Any] = {}
    for axes in panels.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize=9, frameon=False)
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_figure(buffer, format="png", dpi=110)
    return buffer.getvalue()


def draw(axes: Any, lines: Sequence[Line], x: str) -> None:
    """One panel. Methods on the model's own path have bands, the others thin lines."""
    for arm in dict.fromkeys(Arm(line["method"], line["path"]) for line in lines):
        own = sorted((line for line in lines if (line["method"], line["path"]) == arm), key=lambda line: line[x])
        at, middle, low, high = ([of(line) for line in own] for of in (
            lambda line: line[x], *(lambda line, end=end: line["heldout"][end] for end in ("mean", "low", "high"))
        ))  # fmt: skip
        colour = STYLES.get(arm.method) or COLOURS[arm.method.partition("-")[0]]
        if arm.method == "ode":
            axes.axhline(middle[0], color=colour, ls=":", label="one plain sample")
            continue
        if arm.method in OWN_PATH:
            axes.plot(at, middle, marker="o", lw=2.2, color=colour, label=arm.method, zorder=3)
            axes.fill_between(at, low, high, color=colour, alpha=0.13, lw=0)
            continue
        stroke = {"linear": "--", "vp": "-"}[arm.path]
        marker = "x" if arm.method == "rbf-margin0" else "."
        axes.plot(at, middle, marker=marker, lw=1, ls=stroke, color=colour, alpha=0.8, label=str(arm))
    axes.set_xscale("log")
    ticks = sorted(
        {line["budget"] if x == "nfe" else round(line[x], -1) for line in lines if line["method"] == BASELINE}
    )
    axes.set_xticks(ticks, [f"{tick:.0f}" for tick in ticks])
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def contact(results: Results, folder: Path, budget: int = 100) -> bytes | None:
    """PNG: the first prompts, seed 0; plain samples and the methods on the model's own path. None: no pictures here."""
    arms = [Arm(method, path) for path in ("base", "fast") for method in OWN_PATH]
    cases = [Case(arm, results.planner.study.budgets[0] if arm.method == "ode" else budget) for arm in arms]
    cases = [case for case in cases if 0 in results.found.get(case, {})]
    prompts = results.planner.study.prompts[:PICTURES]
    cells: list[list[Any]] = []
    for index in range(len(prompts)):
        rows = [results.found[case][0] for case in cases]
        paths = [picture_path(folder, *case, index) for case in cases]
        images = [read_picture(path) if path.exists() else None for path in paths]
        cells.append(
            [
                None if image is None else (image, row["reward"][index], row["heldout"][index])
                for image, row in zip(images, rows, strict=True)
            ]
        )
    names = [f"{case.arm.method}\n{case.arm.path}" for case in cases]
    return contact_picture(prompts, names, cells) if any(cell for row in cells for cell in row) else None


# ---- the section of a document ----

TITLE = "## Search on scenes\n\n"
INTRO = """\
What every method buys on `scenes` with the same budget: the share of the held-out half of the hard prompts that comes \
out exactly right by the *held-out* verifier, which no search sees; 95 % intervals by bootstrap over prompts, seeds \
averaged, differences paired by prompt and seed. Best-of-n has every lever that the others have: it runs on the base \
path (ten guided steps of the model's ODE, 20 NFE a sample) and on the fast path (eight steps, guided at t = .75, .65 \
and .52 alone, 11 NFE a sample), with rewards only where a decision reads them. *Equal cost*: the largest budget whose \
rows, rewards and decodes cost no more than those of best-of-n on the same path (for methods on a noisy path: on the \
base path), by constants that were measured once in the run; processor seconds stand beside it. RBF's margin 0 is the \
paper's rule. Nothing was chosen on these prompts; intervals are not corrected for their number; this is one small \
model and its verifier, no evidence about FLUX.
"""


def front(lines: Sequence[Line], seeds: int) -> str:
    """What `auto` buys, in five rows."""
    budgets = sorted({line["budget"] for line in lines if line["method"] != "ode"})
    found = {(line["method"], line["path"], line["budget"]): share(line, seeds, ".2f") for line in lines}
    plain = next((text for (method, path, _), text in found.items() if (method, path) == FRONT[0][1]), "")
    body = [
        [name, *([plain] * len(budgets) if arm.method == "ode" else [found.get((*arm, b), "") for b in budgets])]
        for name, arm in FRONT
    ]
    return markdown(("", *(f"{budget} NFE" for budget in budgets)), body)


def write_readme(path: Path, results: Results) -> None:
    """Puts the five rows between the markers. Raises OutputError where there are none."""
    before = path.read_text()
    if BEGIN not in before or END not in before:
        raise OutputError(f"expected {path} to have a line {BEGIN.strip()} and a line {END.strip()}, it has not")
    head, rest = before.split(BEGIN, 1)
    table = front(lines_of(results), results.planner.study.seeds)
    write_text(path, head + BEGIN + table + END + rest.split(END, 1)[1])


def write_docs(path: Path, folder: Path, text: str) -> None:
    """Puts tables and pictures between the markers of a document; where it has none, as a section at its end."""
    images = path.parent / "images"
    shown = ""
    for name, what in (
        ("curve", "held-out share against NFE and cost"),
        ("contact", "pictures of the methods at 100 NFE"),
    ):
        source = folder / f"{name}.png"
        if source.exists():
            write_bytes(images / f"search_{name}.png", source.read_bytes())
            shown += f"![{what}](images/search_{name}.png)\n\n"
    section = f"{INTRO}\n```\n{COMMANDS}```\n\n{shown}{text}"
    before = path.read_text() if path.exists() else "# Results\n"
    if BEGIN in before and END in before:
        head, rest = before.split(BEGIN, 1)
        tail = rest.split(END, 1)[1]
        write_text(path, head + BEGIN + section + END + tail)
    else:
        write_text(path, before.rstrip("\n") + "\n\n" + TITLE + BEGIN + section + END)
