"""What `flowfast bench serve` prints and writes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowfast.benchmark.client import OK, Answer
from flowfast.benchmark.load import Loaded
from flowfast.benchmark.load_config import Goal, LoadConfig
from flowfast.benchmark.results import JSON, PICTURE
from flowfast.benchmark.statistics import spread
from flowfast.report.bench_pictures import serve_picture
from flowfast.report.machine import machine
from flowfast.report.tables import markdown
from flowfast.report.write import drawn, write_bytes, write_json
from flowfast.version import versions

WAITS = {"latency": "latency_s", "queue": "queue_s", "first partial": "first_partial_s"}
"""Lines of the table, and their names in bench.json."""


def load_results(config: LoadConfig, prompts: int, found: Loaded, out: Path) -> str:
    """Writes the files; returns what to print."""
    row = load_figures(config, found)
    facts = config.model_dump(mode="json", exclude={"request_rate"}) | {"request_rate": f"{config.request_rate:g}"}
    head = {"benchmark": "serve", "config": facts, "prompts": prompts, "client": machine(), "versions": versions()}
    requests = [
        {"kind": each.kind, "sent_s": each.sent, "latency_s": each.seconds, "queue_s": each.queue}
        | {"first_partial_s": each.partial}
        for each in found.answers
    ]
    write_json(out / JSON, {**head, **row, "each": requests})
    path = out / PICTURE
    title = f"{len(requests)} requests, rate {config.request_rate:g}"
    again = f"flowfast bench serve ... --out {out}"
    drawn(path, lambda: write_bytes(path, serve_picture(requests, title)), again)
    return shown(row)


def load_figures(config: LoadConfig, found: Loaded) -> dict[str, Any]:
    """Rates, percentiles of those that got a picture, errors by kind, fill and goodput. Of at least one request."""
    good = [each for each in found.answers if each.kind == OK]
    count, errors = len(found.answers), Counter(each.kind for each in found.answers if each.kind != OK)
    within = sum(meets(each, config.goodput) for each in good)
    return {
        "requests": count,
        "answered": len(good),
        "images": sum(each.images for each in good),
        "nfe": sum(each.nfe for each in good),
        "seconds": found.seconds,
        "requests_per_s": len(good) / found.seconds,
        "images_per_s": sum(each.images for each in good) / found.seconds,
        "nfe_per_s": sum(each.nfe for each in good) / found.seconds,
        "latency_s": spread([each.seconds for each in good]),
        "queue_s": spread([each.queue for each in good if each.queue is not None]),
        "first_partial_s": spread([each.partial for each in good if each.partial is not None]),
        "error_latency_s": spread([each.seconds for each in found.answers if each.kind != OK]),
        "late_s": None if config.max_concurrency else spread([each.late for each in found.answers]),
        "fill": fill(found.before, found.after),
        "errors": dict(errors.most_common()),
        "error_share": {kind: number / count for kind, number in errors.most_common()},
        "error_texts": {each.kind: each.message for each in reversed(found.answers) if each.kind != OK},
        "goodput_per_s": within / found.seconds if config.goodput else None,
        "good_share": within / count if config.goodput else None,
    }


def meets(answer: Answer, goals: Mapping[Goal, float]) -> bool:
    """Is it within all of these milliseconds? What it has not, as a request that does not stream has no partial image,
    is within any."""
    took: dict[Goal, float | None] = {"e2e": answer.seconds, "queue": answer.queue, "partial": answer.partial}
    return all((took[name] or 0.0) * 1000 <= most for name, most in goals.items())


def fill(before: Mapping[str, float], after: Mapping[str, float]) -> float | None:
    """Share of the rows that the model saw meanwhile which requests needed; None: the server does not say."""
    names = ("flowfast:rows_total", "flowfast:rows_padded_total")
    if any(name not in after for name in names):
        return None
    rows, padded = (after[name] - before.get(name, 0.0) for name in names)
    return 1 - padded / rows if rows > 0 else None


def shown(row: Mapping[str, Any]) -> str:
    """For the terminal."""
    names = ("mean", "p50", "p95", "p99")
    cells = [[name, *(f"{1000 * row[key][each]:.1f}" for each in names)] for name, key in WAITS.items() if row[key]]
    fill = "" if row["fill"] is None else f", fill {row['fill']:.2f}"
    rates = f"{row['requests_per_s']:.2f} requests/s, {row['images_per_s']:.2f} images/s, {row['nfe_per_s']:.0f} NFE/s"
    of = f"{row['answered']} of {row['requests']} requests have their pictures, in {row['seconds']:.1f} s"
    lines = [f"{of}: {rates}{fill}"]
    if row["good_share"] is not None:
        lines.append(f"goodput: {row['goodput_per_s']:.2f} requests/s, {100 * row['good_share']:.1f} % of them")
    lines += [
        f"{kind}: {count} ({100 * row['error_share'][kind]:.1f} %), the first: {row['error_texts'][kind]}"
        for kind, count in row["errors"].items()
    ]
    return (markdown(("ms", *names), cells) if cells else "") + "\n".join(lines)
