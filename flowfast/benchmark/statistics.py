"""What a benchmark says of a run: rates, percentiles, how full model calls are, where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flowfast.benchmark.run import Run

PERCENTILES = (50, 95, 99)
REST = "rest"
"""What is in no part: the host between rounds, encoding of prompts, and reading of images."""


def spread(seconds: Sequence[float]) -> dict[str, float] | None:
    """Mean, percentiles and extremes; a percentile between two values is on the line from one to the other. None of
    none."""
    if not seconds:
        return None
    values = np.array(seconds, dtype=np.float64)
    shares = {f"p{share}": float(np.percentile(values, share)) for share in PERCENTILES}
    return {"mean": float(values.mean()), **shares, "least": float(values.min()), "most": float(values.max())}


def figures(run: Run) -> dict[str, Any]:
    """Of a run with at least one request. fill: NFE of the requests / rows that the model saw."""
    nfe, images = sum(each.nfe for each in run.served), sum(each.images for each in run.served)
    first = [each.first_sample for each in run.served if each.first_sample is not None]
    return {
        "requests": len(run.served),
        "images": images,
        "nfe": nfe,
        "rows": run.rows,
        "seconds": run.seconds,
        "requests_per_s": len(run.served) / run.seconds,
        "images_per_s": images / run.seconds,
        "nfe_per_s": nfe / run.seconds,
        "fill": nfe / run.rows,
        "latency_s": spread([each.latency for each in run.served]),
        "first_sample_s": spread(first),
        "share": shares(run),
    }


def shares(run: Run) -> dict[str, float]:
    """Of the seconds, by part; together 1."""
    found = {part: seconds / run.seconds for part, seconds in run.parts.items()}
    return {**found, REST: max(0.0, 1.0 - sum(found.values()))}


def ratio(baseline: Sequence[float], run: Run) -> float:
    """The median over turns of seconds of the baseline / seconds of the engine, which ran side by side."""
    return float(np.median([each / served.latency for each, served in zip(baseline, run.served, strict=True)]))


def best(rows: Sequence[dict[str, Any]]) -> int:
    """The setting with the most requests a second; of equal ones the first."""
    return max(range(len(rows)), key=lambda at: rows[at]["requests_per_s"])
