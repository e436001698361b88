"""The table of speed in docs/results.md and the README's three numbers, from bench/results: none is typed by hand.

python -m bench.table             prints both
python -m bench.table --write     puts them into docs/results.md and README.md
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"
PUBLIC = "the paper's public code"
FLUX = "FLUX latent"
Row = dict[str, Any]


def rows_of(name: str, **facts: Any) -> Iterator[Row]:
    for row in json.loads((RESULTS / f"{name}.json").read_text())["rows"]:
        if all(row.get(key) == value for key, value in facts.items()):
            yield row


def times(row: Row) -> str:
    return f"{row['ratio']:.1f}x"


def share(row: Row) -> str:
    return f"{1 / row['ratio']:.2f} of it"


def line(what: str, peer: str, show: Callable[[Row], str], *found: Row) -> str:
    ours = " / ".join(f"{row['ours_ms']:.3g} ms" for row in found)
    return f"| {what} | {peer} | {ours} | {' / '.join(map(show, found))} |"


def lines() -> Iterator[str]:
    first = next(rows_of("step_x0"))
    versions = first["versions"]
    yield (
        f"One thread of an {versions['processor']} ({versions['instruction_set']}), torch {versions['torch']}; "
        "medians, both sides in one run. Ratios above 1x: ours is faster. None of this was timed on a GPU."
    )
    yield ""
    yield "| what | against | ours | ratio |"
    yield "| --- | --- | --- | --- |"
    step = {
        (batch, dtype, row["peer"]): row
        for batch in (1, 8)
        for dtype in ("float32", "bfloat16")
        for row in rows_of("step_x0", batch=batch, dtype=dtype)
    }
    for peer, name, show in (
        ("eager", "PyTorch eager", times),
        ("compile", "torch.compile", times),
        ("randn", "`torch.randn_like` alone", share),
    ):
        found = [step[batch, "float32", peer] for batch in (1, 8)]
        yield line(f"SDE step with posterior mean, {FLUX} (4096 x 64), float32, batch 1 / 8", name, show, *found)
    found = [step[batch, "bfloat16", "float32"] for batch in (1, 8)]
    yield line("the same in bfloat16", "ours in float32", share, *found)
    yield line(
        "in-place resampling, 16 x 1 MiB, 6 dead", "`x[index]`", times, *rows_of("resample_in_place", peer="index")
    )
    for case, what in (
        ("flux-bfloat16-text", "FLUX latents and text, bfloat16"),
        ("flux-bfloat16", "FLUX latents, bfloat16"),
        ("flux-float32", "FLUX latents, float32"),
        ("scenes-float32", "3 x 32 x 32, float32"),
    ):
        found = [
            row for engine in ("python", "scripted")
            for row in rows_of("rbf_evaluation", case=case, engine=engine, peer="public_code")
        ]  # fmt: skip
        yield line(
            f"an RBF evaluation beside the model, {what}, Python / TorchScript",
            PUBLIC,
            times,
            *found,
        )
    host = [next(rows_of("rbf_evaluation", case="scenes-float32", engine=engine)) for engine in ("python", "scripted")]
    micros = [f"{row['host_us_a_round']:.0f} us" for row in host]
    yield (
        f"| host work of a round, Python / TorchScript | | {' / '.join(micros)} "
        f"| {host[0]['launches_a_round']:.0f} launches |"
    )
    (overhead,) = rows_of("search_overhead")
    yield (
        f"| search on `scenes`, 16 prompts | its model, decoder and reward | {overhead['ours_ms']:.0f} ms | "
        f"{100 * overhead['fraction']:.1f} % more |"
    )
    yield line("a host reward as slow as the model, 16 prompts", "without overlap", times, *rows_of("host_reward"))
    yield line("`scenes`, RBF, 200 NFE, 4 prompts in `flowfast-run`", "Python", times, *rows_of("cpp_runner"))
    for slots in (1, 16):
        (row,) = rows_of("latency", slots=slots)
        yield (
            f"| `scenes`, RBF, 60 NFE, {slots} slot{'s' * (slots > 1)} | | p50 / p95 / p99 {row['p50_ms']:.0f} / "
            f"{row['p95_ms']:.0f} / {row['p99_ms']:.0f} ms | {row['images_s']:.1f} images/s |"
        )


def table() -> str:
    return "\n".join(lines()) + "\n"


def numbers() -> str:
    """What auto buys at equal cost, an RBF evaluation against the paper's code, the host's work of a round."""
    search = json.loads((RESULTS / "search" / "heldout" / "results.json").read_text())
    (goal,) = [each for each in search["goals"] if each["what"].startswith("auto/base - bon/base, 100 NFE, equal cost")]
    gain = {end: 100 * value for end, value in goal["difference"].items()}
    (evaluation,) = rows_of("rbf_evaluation", case="flux-bfloat16-text", engine="python", peer="public_code")
    scripted = next(rows_of("rbf_evaluation", case="scenes-float32", engine="scripted"))
    python = next(rows_of("rbf_evaluation", case="scenes-float32", engine="python"))
    processor = evaluation["versions"]["processor"]
    public = "python -m bench rbf_evaluation --public-code FOLDER"
    return (
        f"- **{gain['mean']:.0f} of 100 prompts more are right** (95 % interval {gain['low']:.0f} to "
        f"{gain['high']:.0f}) with `auto` than with best-of-n at equal cost, 100 NFE: hard prompts of the small model "
        f"`scenes`, by a verifier that search never sees. `python -m bench.studies.search_evidence --split heldout "
        f"--out bench/results/search`\n"
        f"- **{evaluation['ratio']:.1f}x as fast as the paper's public code**: all that an RBF evaluation costs beside "
        f"the model, latents and text of FLUX's size in bfloat16, {evaluation['ours_ms']:.2f} ms against "
        f"{evaluation['peer_ms']:.2f} ms (one thread, {processor}). `{public}`\n"
        f"- **{python['host_us_a_round']:.0f} us of the host a round** of a search in Python, "
        f"{scripted['host_us_a_round']:.0f} us in TorchScript, for {python['launches_a_round']:.0f} launches beside "
        f"model, decoder and reward (the same machine and command).\n"
    )


PLACES = {"README.md": ("bench.numbers", numbers), "docs/results.md": ("bench.table", table)}


def written(name: str, text: str) -> str:
    """A page of PLACES with the figures of now between its marks."""
    mark, figures = PLACES[name]
    begin, end = f"<!-- {mark} -->\n", f"<!-- /{mark} -->\n"
    before, rest = text.split(begin)
    return before + begin + figures() + end + rest.split(end)[1]


def main() -> int:
    if sys.argv[1:] == ["--write"]:
        for name in PLACES:
            path = ROOT / name
            path.write_text(written(name, path.read_text(encoding="utf-8")), encoding="utf-8")
    else:
        print(numbers(), table(), sep="\n", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
