"""What a benchmark prints and writes: tables, bench.json and bench.png."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowfast.benchmark.run import Latency, Setting, Workload
from flowfast.benchmark.statistics import best, figures, ratio, spread
from flowfast.config import Rerun
from flowfast.report.bench_pictures import latency_picture, throughput_picture
from flowfast.report.machine import machine
from flowfast.report.tables import markdown
from flowfast.report.write import drawn, write_bytes, write_json
from flowfast.version import versions

JSON, PICTURE = "bench.json", "bench.png"


def latency_results(work: Workload, found: Latency, warmup: int, out: Path) -> str:
    """Writes the files; returns what to print."""
    row = figures(found.run)
    seconds = [each.latency for each in found.run.served]
    first = [each.first_sample for each in found.run.served]
    row |= {"latencies_s": seconds, "first_samples_s": first, "slots": found.slots, "micro_batch": found.micro_batch}
    lines = {"latency": row["latency_s"], "first sample": row["first_sample_s"]}
    curves = {"latency": seconds, "first sample": [each for each in first if each is not None]}
    text = ""
    if found.baseline:
        row["diffusers_s"], row["diffusers_ratio"] = spread(found.baseline), ratio(found.baseline, found.run)
        row["diffusers_latencies_s"] = found.baseline
        lines["diffusers"], curves["diffusers"] = row["diffusers_s"], found.baseline
        row["diffusers_images"] = found.images
        what = f"diffusers' own loop, {found.images} plain samples a prompt and no reward"
        text = f"\n{what}: {row['diffusers_ratio']:.2f} x the time (median over turns)"
    write(work, "latency", {"warmup": warmup, **row}, out, lambda: latency_picture(curves, row["share"], title(work)))
    names = ("mean", "p50", "p95", "p99")
    cells = [[name, *(f"{1000 * value[each]:.1f}" for each in names)] for name, value in lines.items() if value]
    return (
        markdown(("ms", *names), cells)
        + f"{row['requests']} requests, {title(work)}: {row['nfe_per_s']:.0f} NFE/s, fill {row['fill']:.2f}; "
        + said(row["share"])
        + text
    )


def throughput_results(work: Workload, found: Sequence[Setting], warmup: int | None, out: Path) -> str:
    """Writes the files; returns what to print."""
    rows = [
        {
            "slots": each.slots,
            "micro_batch": each.micro_batch,
            "slots_held": each.slots_held,
            "micro_batch_held": each.micro_batch_held,
            "requests_per_s_of_turns": each.rates,
            **figures(each.run),
        }
        for each in found
    ]
    at = best(rows)
    options = f"--slots {rows[at]['slots']} --micro-batch {rows[at]['micro_batch']}"
    facts = {"warmup": "slots" if warmup is None else warmup, "best": options, "rows": rows}
    write(work, "throughput", facts, out, lambda: throughput_picture(rows, at, title(work)))
    head = ("slots", "micro-batch", "requests/s", "images/s", "NFE/s", "fill", "p50 s", "p99 s", *rows[0]["share"], "")
    return markdown(head, [cells(row, row is rows[at]) for row in rows]) + (
        f"{rows[0]['requests']} requests each, {title(work)}; most requests/s: {options}"
    )


def cells(row: dict[str, Any], is_best: bool) -> list[str]:
    """A row of the table."""

    def held(name: str) -> str:
        asked, got = row[name], row[f"{name}_held"]
        return f"{asked} ({got} fit)" if got < asked else str(asked)

    return [
        held("slots"),
        held("micro_batch"),
        *(f"{row[name]:.2f}" for name in ("requests_per_s", "images_per_s")),
        f"{row['nfe_per_s']:.0f}",
        f"{row['fill']:.2f}",
        *(f"{row['latency_s'][name]:.3f}" for name in ("p50", "p99")),
        *(f"{100 * share:.0f} %" for share in row["share"].values()),
        "best" if is_best else "",
    ]


def said(share: Mapping[str, float]) -> str:
    return ", ".join(f"{part} {100 * amount:.0f} %" for part, amount in share.items())


def title(work: Workload) -> str:
    return f"{work.config.method}, {work.config.budget} NFE"


def write(work: Workload, what: str, facts: dict[str, Any], out: Path, picture: Callable[[], bytes]) -> None:
    config = work.config.model_dump(exclude={"seconds", *Rerun.model_fields})
    head = {"benchmark": what, "config": config, "prompts": len(work.prompts)}
    write_json(out / JSON, {**head, "machine": machine(), "versions": versions(), **facts})
    path, again = out / PICTURE, f"flowfast bench {what} ... --out {out}"
    drawn(path, lambda: write_bytes(path, picture()), again)
