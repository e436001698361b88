"""Runs the benchmarks: pytest-benchmark suites in bench/ops and bench/e2e.

    python -m bench                            all of them; writes bench/results/<name>.json
    python -m bench step_x0 rbf_evaluation     these
    python -m bench --quick --results out      smallest sizes: does everything run? (figures mean nothing)

`rbf_evaluation` runs the public code of arXiv 2503.19385 beside ours when --public-code (or FLOWFAST_PUBLIC_CODE) names
a checkout of it. Figures worth keeping need cores that do nothing else: pin the process, on Linux with
`taskset -c 0 python -m bench`.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SUITES = {
    path.stem: path for folder in ("ops", "e2e") for path in sorted((HERE / folder).glob("*.py"))
    if "\ndef test_" in path.read_text(encoding="utf-8")
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(SUITES)}; none: all")
    parser.add_argument("--quick", action="store_true", help="smallest sizes; writes only where --results says")
    parser.add_argument("--results", type=Path, help="folder of the JSON files (default bench/results)")
    parser.add_argument("--threads", type=int, default=1, help="of torch (default 1)")
    parser.add_argument("--turns", type=int, help="turns of every candidate, instead of each benchmark's own number")
    parser.add_argument("--public-code", help="a checkout of the paper's public code")
    options = parser.parse_args()
    for name in options.names:
        if name not in SUITES:
            parser.error(f"unknown benchmark {name!r}: choose of {', '.join(SUITES)}")
    arguments = [str(SUITES[name]) for name in options.names or SUITES]
    arguments += [
        "-q",
        "-s",
        "--benchmark-quiet",
        "--disable-warnings",
        "-p",
        "no:cacheprovider",
        f"--threads={options.threads}",
    ]
    arguments += ["--quick"] if options.quick else []
    arguments += [f"--turns={options.turns}"] if options.turns else []
    arguments += [f"--public-code={options.public_code}"] if options.public_code else []
    results = options.results or (None if options.quick else HERE / "results")
    arguments += [f"--results={results}"] if results else []
    return int(pytest.main([f"--rootdir={HERE.parent}", *arguments]))


if __name__ == "__main__":
    sys.exit(main())
