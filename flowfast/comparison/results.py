"""The files of a comparison that people look at: results.json, table.md, curve.png and contact.png."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from flowfast.comparison.design import PICTURES, Arm, Comparison
from flowfast.comparison.statistics import RESAMPLES
from flowfast.report.machine import machine
from flowfast.report.pictures import base_of, contact_picture, curve_picture
from flowfast.report.tables import HEAD, comparison_rows, markdown, overview
from flowfast.report.write import drawn, read_picture, write_bytes, write_json, write_text


def write_results(
    comparison: Comparison, results: list[dict[str, Any]], lines: Sequence[dict[str, Any]], out: Path
) -> None:
    head = {
        "comparison": asdict(comparison),
        "interval": f"95 %, percentile bootstrap over prompts, {RESAMPLES} resamples",
        "machine": machine(),
        "versions": lines[-1]["versions"],
    }
    write_json(out / "results.json", {**head, "rows": results})
    write_text(out / "table.md", overview(results) + "\n" + markdown(HEAD, comparison_rows(results)))
    what = "reward" if results[0]["heldout"] is None else "heldout"
    curve, contact, again = out / "curve.png", out / "contact.png", f"flowfast compare ... --out {out}"
    drawn(curve, lambda: write_bytes(curve, curve_picture(results, what)), again)
    drawn(contact, lambda: write_bytes(contact, contact_sheet(comparison, lines, out)), again)


def contact_sheet(comparison: Comparison, lines: Sequence[dict[str, Any]], out: Path) -> bytes:
    """The first prompts, seed 0, every method and path at the largest budget."""
    arms = [arm for arm in comparison.arms() if base_of(arm.method) == "ode" or arm[2:] == largest(comparison)]
    prompts = comparison.prompts[:PICTURES]
    found: dict[tuple[Arm, str], tuple[float, float | None]] = {}
    for line in lines:
        if line["seed"] == 0:
            scores = line["heldout"] or [None] * len(line["prompts"])
            for prompt, reward, score in zip(line["prompts"], line["reward"], scores, strict=True):
                found[Arm(*line["arm"]), prompt] = (reward, score)
    cells: list[list[tuple[np.ndarray, float, float | None] | None]] = []
    for index, prompt in enumerate(prompts):
        images = [read_picture(picture_path(out, arm, index)) for arm in arms]
        row = zip(arms, images, strict=True)
        cells.append([None if image is None else (image, *found[arm, prompt]) for arm, image in row])
    several = len(comparison.interpolants) > 1
    names = [f"{a.method}\n{a.interpolant}" if several else a.method for a in arms]
    return contact_picture(prompts, names, cells)


def largest(comparison: Comparison) -> tuple[int | None, float | None]:
    return (max(comparison.budgets), None) if comparison.budgets else (None, max(comparison.seconds))


def picture_path(out: Path, arm: Arm, index: int) -> Path:
    return out / "pictures" / arm.slug / f"{index:02d}.png"
