"""What search buys on `scenes`: every method at equal NFE, and at the NFE that cost what best-of-n's do.

    python -m bench.studies.search_evidence --split heldout --out bench/results/search

Rows go to OUT/SPLIT, a line a finished search call; run it again with the same --out to go on after a stop.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.studies.search_evidence.design import Study, chosen_arms
from bench.studies.search_evidence.run import Row, run
from flowfast.errors import FlowfastError
from flowfast.memory import keep_memory


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--split", choices=("heldout", "tuning"), default="heldout", help="half of the hard prompts")
    parser.add_argument("--arms", default="", help="only these: bon/base,prune,...; default: all")
    parser.add_argument("--budgets", default="", help="only these, in NFE: 50,100; default: 50,100,200,500")
    parser.add_argument("--seeds", type=int, default=3, help="seeds 0 .. N-1")
    parser.add_argument("--workers", type=int, default=1, help="processes of one thread each")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    keep_memory()
    torch.set_num_threads(1)
    try:
        budgets = tuple(int(word) for word in options.budgets.split(",") if word)
        study = Study(split=options.split, budgets=budgets, seeds=options.seeds)
        run(study, chosen_arms(options.arms), options.out / options.split, options.workers, told)
    except FlowfastError as error:
        print(f"search_evidence: {error}", file=sys.stderr)
        return 2
    return 0


def told(done: int, of: int, row: Row) -> None:
    right, seconds = sum(row["heldout"]) / len(row["heldout"]), row["seconds"]["total"]
    name = f"{row['method']}/{row['path']} {row['budget']} NFE, seed {row['seed']}"
    print(f"{done}/{of} {name}: {right:.3f} exactly right, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
