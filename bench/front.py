"""The README's picture: plain samples of `scenes` beside what a search finds with the same seed.

python -m bench.front --out docs/images/front.png

The prompts are the first six hard ones of the held-out half, seed 0: none was chosen by its pictures. The mark is the
held-out verifier's, which the search never sees.
"""

from __future__ import annotations

import argparse
import textwrap
from collections.abc import Sequence
from pathlib import Path

import torch
from matplotlib.figure import Figure

import flowfast
from flowfast.models.heldout import heldout
from flowfast.models.scenes.prompts import hard_prompts
from flowfast.report.pictures import BAD, GOOD, png
from flowfast.report.write import write_bytes
from flowfast.types import Sample

PROMPTS, BUDGET = 6, 200


def sheet(prompts: Sequence[str], rows: Sequence[tuple[str, Sequence[Sample], Sequence[bool]]]) -> bytes:
    """PNG: a column a prompt, a row a method; (name, samples, whether the held-out verifier finds them right)."""
    figure = Figure(figsize=(1.5 * len(prompts) + 1.1, 1.62 * len(rows) + 0.55), layout="constrained", dpi=110)
    grid = figure.subplots(len(rows), len(prompts), squeeze=False)
    for axes_row, (name, samples, right) in zip(grid, rows, strict=True):
        axes_row[0].set_ylabel(name, fontsize=10, rotation=0, ha="right", va="center", labelpad=8)
        for axes, sample, good in zip(axes_row, samples, right, strict=True):
            axes.imshow(sample.image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            colour = GOOD if good else BAD
            axes.set_xlabel("\N{CHECK MARK} right" if good else "\N{BALLOT X} wrong", fontsize=9, color=colour)
            for spine in axes.spines.values():
                spine.set(color=colour, linewidth=1.8)
    for axes, prompt in zip(grid[0], prompts, strict=True):
        axes.set_title(textwrap.fill(prompt, 19), fontsize=8)
    return png(figure)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.front", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("front.png"))
    parser.add_argument("--prompts", type=int, default=PROMPTS)
    parser.add_argument("--budget", type=int, default=BUDGET, help=f"NFE a prompt of the search (default {BUDGET})")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    flow = flowfast.load("scenes")
    prompts = hard_prompts("heldout")[: options.prompts]
    rows = []
    for name, method in (("plain sample\n{} NFE", "ode"), ("search\n{} NFE", "auto")):
        found = flowfast.search(flow, prompts, reward="scenes", method=method, budget=options.budget, seed=0)
        scores = heldout("scenes", [sample.image for sample in found.samples], prompts)
        right = [score >= 0.5 for score in scores or ()]
        rows.append((name.format(max(sample.nfe for sample in found.samples)), found.samples, right))
        print(f"{method}: {sum(right)} of {len(prompts)} right")
    write_bytes(options.out, sheet(prompts, rows))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
