"""Does pruning pay on FLUX.1-dev? Best-of-n, method `prune` with its own cuts, and `prune` with the two cuts that do
best on one half of the prompts ("calibrated"), replayed at equal cost on the other half.

    python -m bench.studies.flux_pruning SOURCE [--out FOLDER]

SOURCE is the folder simulation/values of a checkout of github.com/TerrysLearning/TTSnap (arXiv 2511.22242), or an .npz
file of its arrays `imr`, `pic` and `hps` (prompts, images, steps): ImageReward, PickScore and HPSv2 of the posterior
mean after each of 20 ODE steps at 512 x 512, of 200 images of each of 200 prompts. Nothing is drawn or timed here. Cuts
are chosen on prompts 0, 2, 4, ...; values and differences are those of prompts 1, 3, 5, ...

Values are in standard deviations of a prompt's finished images, from their mean. One reward selects, at the cuts and at
the end; its own verdict on the image is what a search would report. The mean of the other two rewards' verdicts is the
fairer figure: they are held out. Intervals are 95 %, from a bootstrap over prompts. Of best-of-n the value is shown, of
the others the difference from it; "as best of" is the number of samples with which best-of-n has that own verdict.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.studies.flux_pruning.bank import flux_times, read
from bench.studies.flux_pruning.report import picture, tables
from bench.studies.flux_pruning.study import Settings, rank_correlations, study
from flowfast.bounds import refused
from flowfast.errors import FlowfastError
from flowfast.report.write import write_bytes, write_json

OUT = Path(__file__).resolve().parents[2] / "results" / "flux_pruning"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="simulation/values, or an .npz file")
    for name, field in Settings.model_fields.items():
        option = f"--{name.replace('_', '-')}"
        text = (field.description or "").split("\n\n")[0]
        parser.add_argument(option, default=field.default, help=f"{text} (default {field.default})")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of flux_pruning.json and flux_pruning.png")
    options = parser.parse_args(argv)
    try:
        settings = Settings(**{name: getattr(options, name) for name in Settings.model_fields})
        results = run(options.source, settings)
        write_json(options.out / "flux_pruning.json", results)
        write_bytes(options.out / "flux_pruning.png", picture(results))
    except ValidationError as error:
        print(f"flux_pruning: {refused(error)}", file=sys.stderr)
        return 2
    except FlowfastError as error:
        print(f"flux_pruning: {error}", file=sys.stderr)
        return 2
    print(f"{results['prompts']}; {settings.verification:g} of a step a verification\n\n{tables(results)}")
    return 0


def run(source: Path, settings: Settings) -> dict[str, Any]:
    """Raises OptionError."""
    bank = read(source)
    P, N, T = bank.shape
    times = flux_times(T)
    return {
        "source": "github.com/TerrysLearning/TTSnap, simulation/values",
        "prompts": f"{P} prompts, {P - P // 2} of them for the choice of cuts; {N} images each, {T} steps",
        "settings": settings.model_dump(),
        "times": times,
        "rho": rank_correlations(bank),
        "rows": list(study(bank, times, settings)),
    }


if __name__ == "__main__":
    sys.exit(main())
