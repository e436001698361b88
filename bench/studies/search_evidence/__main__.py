"""What search buys on `scenes`: every method at equal NFE, and at the NFE that cost what best-of-n's do.

    python -m bench.studies.search_evidence --split heldout --out bench/results/search

Rows go to OUT/SPLIT, a line a finished search call; run it again with the same --out to go on after a stop. Beside
them stand results.json, table.md, curve.png and contact.png, of what is done. --summary only writes these, also while
another process runs. --docs puts them into a document, --readme five rows
of them into another. The best method at 500 NFE is chosen by the rows of OUT/tuning.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.studies.search_evidence.design import Study, chosen_arms
from bench.studies.search_evidence.run import ROWS, Row, open_study, run, valid_rows
from bench.studies.search_evidence.shown import write_all, write_docs, write_readme
from bench.studies.search_evidence.summary import Results
from flowfast.errors import FlowfastError
from flowfast.memory import keep_memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("heldout", "tuning"), default="heldout", help="half of the hard prompts")
    parser.add_argument("--arms", default="", help="only these: bon/base,prune,...; default: all")
    parser.add_argument(
        "--budgets", type=numbers, default=(), help="only these, in NFE: 50,100; default: 50,100,200,500"
    )
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--summary", action="store_true", help="run nothing, only write what is done")
    parser.add_argument("--docs", type=Path, help="a document for the tables and pictures of the held-out half")
    parser.add_argument("--readme", type=Path, help="a document for the five rows of what auto buys")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    keep_memory()
    torch.set_num_threads(1)
    try:
        study = Study(split=options.split, budgets=options.budgets, seeds=options.seeds)
        folder, tuning = options.out / options.split, options.out / "tuning"
        if not options.summary:
            run(study, chosen_arms(options.arms), folder, options.workers, told)
        results = results_in(study, folder)
        text = write_all(results, of_tuning(tuning, options.seeds), folder)
        if options.docs:
            write_docs(options.docs, folder, text)
        if options.readme:
            write_readme(options.readme, results)
        print(text)
    except FlowfastError as error:
        print(f"search_evidence: {error}", file=sys.stderr)
        return 2
    return 0


def numbers(text: str) -> tuple[int, ...]:
    return tuple(sorted({int(word) for word in text.split(",") if word}))


def results_in(study: Study, folder: Path) -> Results:
    planner = open_study(study, folder)
    return Results(planner, valid_rows(planner, folder))


def of_tuning(folder: Path, seeds: int) -> Results | None:
    """What is done on the tuning half."""
    return results_in(Study(split="tuning", seeds=seeds), folder) if (folder / ROWS).exists() else None


def told(done: int, of: int, row: Row) -> None:
    right, seconds = sum(row["heldout"]) / len(row["heldout"]), row["seconds"]["total"]
    name = f"{row['method']}/{row['path']} {row['budget']} NFE, seed {row['seed']}"
    print(f"{done}/{of} {name}: {right:.3f} exactly right, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
