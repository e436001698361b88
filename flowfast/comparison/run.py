"""Runs a comparison, resumably: a finished search call is a line of rows.jsonl, and a run into the same folder goes on
from there."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flowfast import api, secrets
from flowfast.comparison.design import PICTURES, Arm, Comparison, Job, check
from flowfast.comparison.results import picture_path, write_results
from flowfast.comparison.statistics import summarise
from flowfast.errors import OutputError
from flowfast.files import locked_folder, sweep
from flowfast.memory import keep_memory
from flowfast.models.heldout import heldout
from flowfast.report.write import Lines, check_places, damaged, number, read_lines, write_picture
from flowfast.types import Flow


def run(
    comparison: Comparison,
    flow: Flow,
    out: Path,
    on_job: Callable[[int, int, str], None] | None = None,
    workers: int = 1,
) -> list[dict[str, Any]]:
    """Runs what rows.jsonl in `out` lacks, then writes results.json, table.md, curve.png and contact.png.

    Args:
        on_job: told (jobs done, jobs in all, which one).
        workers: processes, each with its share of the threads; jobs keep their order, so arms still take turns.

    Returns:
        The rows of results.json. Raises FlowfastError; OutputError where `out` holds another comparison.
    """
    check(comparison, flow)
    with locked_folder(out):
        return _run(comparison, flow, out, on_job, workers)


def _run(
    comparison: Comparison, flow: Flow, out: Path, on_job: Callable[[int, int, str], None] | None, workers: int
) -> list[dict[str, Any]]:
    pictures = [picture_path(out, arm, 0).parent for arm in comparison.arms()]
    check_places([out], ["rows.jsonl", "comparisons.jsonl", "results.json", "table.md", "curve.png", "contact.png"])
    check_places([out / "pictures", *pictures], [])
    for folder in pictures:
        sweep(folder)
    remember(comparison, out)
    lines = rows_of(out / "rows.jsonl")
    done = {(Arm(*line["arm"]), line["seed"], tuple(line["prompts"])) for line in lines}
    jobs = list(comparison.jobs())
    rows = Lines(out / "rows.jsonl", sync=True)
    missing = [job for job in jobs if job not in done]
    for count, line in enumerate(run_jobs(comparison, flow, missing, out, workers), len(jobs) - len(missing) + 1):
        rows.add(line)
        lines.append(line)
        if on_job:
            arm = Arm(*line["arm"])
            on_job(count, len(jobs), f"{arm.method} {arm.interpolant} {arm.amount} seed {line['seed']}")
    rows.close()
    with np.errstate(invalid="ignore"):  # of infinite rewards no interval is known
        results = summarise(comparison, lines)
    write_results(comparison, results, lines, out)
    return results


_work: tuple[Comparison, Flow, Path]  # of a worker process


def run_jobs(
    comparison: Comparison, flow: Flow, jobs: Sequence[Job], out: Path, workers: int
) -> Iterator[dict[str, Any]]:
    """Lines for rows.jsonl, in the order of the jobs."""
    if workers == 1:
        for job in jobs:
            yield run_job(comparison, flow, *job, out)
        return
    shared = (comparison, out, workers, secrets.GIVEN)
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, shared) as pool:
        yield from pool.imap(_run_in_worker, jobs)


def _start_worker(comparison: Comparison, out: Path, workers: int, given: dict[str, Any]) -> None:
    global _work
    secrets.GIVEN.update(given)
    keep_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _work = (comparison, api.load(comparison.model), out)


def _run_in_worker(job: Job) -> dict[str, Any]:
    comparison, flow, out = _work
    return run_job(comparison, flow, *job, out)


def run_job(
    comparison: Comparison, flow: Flow, arm: Arm, seed: int, prompts: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """One search call; the pictures of the contact sheet go to `out`/pictures. Returns the line for rows.jsonl."""
    result = api.search(flow, list(prompts), config=comparison.config(arm, seed))
    samples = result.samples
    for prompt, sample in zip(prompts, samples, strict=True):
        if seed == 0 and prompt in comparison.prompts[:PICTURES]:
            write_picture(picture_path(out, arm, comparison.prompts.index(prompt)), sample.image)
    return {
        "arm": list(arm),
        "seed": seed,
        "prompts": list(prompts),
        "reward": [sample.reward for sample in samples],
        "heldout": heldout(comparison.model, [sample.image for sample in samples], prompts),
        "nfe": [sample.nfe for sample in samples],
        "unspent": [sample.unspent for sample in samples],
        "rows_padded": result.rows_padded,
        "seconds": result.seconds,
        "overshoot": result.overshoot,
        "versions": result.versions,
    }


def remember(comparison: Comparison, out: Path) -> None:
    """Notes the comparison in comparisons.jsonl; raises OutputError if another is there (arms and seeds may grow)."""
    path, now = out / "comparisons.jsonl", asdict(comparison)
    before = read_lines(path)
    if before and not isinstance(before[-1], dict):
        raise damaged(path, len(before), ValueError("no object"))
    free = {"methods", "budgets", "seconds", "interpolants", "seeds"}
    now = {key: list(value) if isinstance(value, tuple) else value for key, value in now.items()}
    now["reward"] = secrets.without_login(comparison.reward)  # a server may come to want a key
    if before:
        for key in sorted(now.keys() - free):
            if before[-1].get(key) != now[key]:
                raise OutputError(
                    f"{out} holds a comparison with other {key}: choose another --out, or the same {key} to go on"
                )
    lines = Lines(path)
    lines.add(now)
    lines.close()


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The lines of rows.jsonl as `run_job` made them. Raises OutputError."""
    lines = read_lines(path)
    for count, line in enumerate(lines, 1):
        try:
            Arm(*line["arm"])
            for what in ("reward", "heldout", "nfe", "unspent"):
                if what != "heldout" or line[what] is not None:
                    line[what] = [number(value) for value in line[what]]
                    if len(line[what]) != len(line["prompts"]):
                        raise ValueError(f"{what} of {len(line[what])} of {len(line['prompts'])} prompts")
            line["seconds"]["total"] = float(line["seconds"]["total"])
            line["seed"], line["versions"] = int(line["seed"]), dict(line["versions"])
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, count, error) from None
    return lines
