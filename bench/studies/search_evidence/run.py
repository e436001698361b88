"""Runs a study, resumably: a finished search call is a line of rows.jsonl, and a run into the same folder goes on from
there."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench.studies.search_evidence.design import Arm, Job, Study
from bench.studies.search_evidence.order import order
from bench.studies.search_evidence.planner import Costs, Planner, measured
from flowfast import api
from flowfast.errors import OutputError
from flowfast.files import locked_folder, sweep
from flowfast.memory import keep_memory
from flowfast.models.heldout import heldout
from flowfast.report.write import Lines, check_places, damaged, read_lines, write_json, write_picture

ROWS = "rows.jsonl"
PICTURES = 8  # prompts on the contact sheet
PER_PROMPT = ("reward", "heldout", "nfe", "evaluations", "reward_calls", "decodes", "unspent")
Row = dict[str, Any]


def run(
    study: Study, arms: Sequence[Arm], folder: Path, workers: int, on_row: Callable[[int, int, Row], None] | None = None
) -> None:
    """Runs the jobs that rows.jsonl in `folder` lacks.

    on_row: told (jobs done, jobs in all, the new row). workers: processes of one thread each. Raises FlowfastError;
    OutputError where `folder` holds another study."""
    with locked_folder(folder):
        read_lines(folder / ROWS)  # takes a last line off that a crash cut short
        planner = open_study(study, folder)
        jobs = list(order(planner, arms))
        done = {job_of(row) for row in valid_rows(planner, folder)}
        missing = [job for job in jobs if job not in done]
        for job in missing:
            sweep(picture_path(folder, job.arm, job.budget, 0).parent)
        rows = Lines(folder / ROWS, sync=True)
        for count, row in enumerate(run_jobs(planner, missing, folder, workers), len(jobs) - len(missing) + 1):
            rows.add(row)
            if on_row:
                on_row(count, len(jobs), row)
        rows.close()


def open_study(study: Study, folder: Path) -> Planner:
    """The planner of the folder's study, with its constants: measured now where it has none yet. Raises
    OutputError."""
    check_places([folder], [ROWS, "study.json", "constants.json"])
    flow = api.load("scenes")
    asked, path = study.fixed(), folder / "study.json"
    if path.exists():
        held = read_object(path)
        for key, value in asked.items():
            if held.get(key) != value:
                raise OutputError(
                    f"{folder} holds a study with other {key}: choose another --out, or the same {key} to go on"
                )
    else:
        write_json(path, asked)
    constants = folder / "constants.json"
    if not constants.exists():
        write_json(constants, asdict(measured(flow, study)))
    try:
        costs = Costs(**read_object(constants))
    except TypeError as error:
        raise damaged(constants, 1, error) from None
    return Planner(flow, study, costs)


def read_object(path: Path) -> dict[str, Any]:
    """Raises OutputError."""
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise damaged(path, 1, error) from None
    return found


def job_of(row: Row) -> Job:
    return Job(Arm(row["method"], row["path"]), row["budget"], row["seed"])


def valid_rows(planner: Planner, folder: Path) -> list[Row]:
    """The whole rows of the searches that arms and budgets mean today, also while others are written; of other searches
    with their names nothing is used. Raises OutputError."""
    found: dict[Job, Row] = {}
    path = folder / ROWS
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    for count, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
            job = job_of(row)
            if any(len(row[name]) != len(planner.study.prompts) for name in PER_PROMPT):
                raise ValueError(f"expected {len(planner.study.prompts)} numbers a list")
            search = row["search"]
        except (KeyError, TypeError, ValueError) as error:
            raise damaged(path, count, error) from None
        known = planner.why_not(job.arm) is None and planner.runs(job.arm, job.budget)
        if known and search == planner.facts(job.arm, job.budget):
            found[job] = row
    return list(found.values())


_work: tuple[Planner, Path]  # of a worker process


def run_jobs(planner: Planner, jobs: Sequence[Job], folder: Path, workers: int) -> Iterable[Row]:
    """Rows as they are done; jobs begin in their order."""
    if workers == 1:
        yield from (run_job(planner, job, folder) for job in jobs)
        return
    shared = (planner.study, planner.costs, folder)
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, shared) as pool:
        yield from pool.imap_unordered(_run_in_worker, jobs)


def _start_worker(study: Study, costs: Costs, folder: Path) -> None:
    global _work
    keep_memory()
    torch.set_num_threads(1)
    _work = (Planner(api.load("scenes"), study, costs), folder)


def _run_in_worker(job: Job) -> Row:
    planner, folder = _work
    return run_job(planner, job, folder)


def run_job(planner: Planner, job: Job, folder: Path) -> Row:
    """One search call. The pictures for the contact sheet go to `folder`/pictures."""
    study, used = planner.study, time.process_time()
    result = api.search(planner.flow, list(study.prompts), config=study.config(*job))
    used = time.process_time() - used
    samples = result.samples
    for index, sample in enumerate(samples[:PICTURES] if job.seed == 0 else ()):
        write_picture(picture_path(folder, job.arm, job.budget, index), sample.image)
    scores = heldout("scenes", [sample.image for sample in samples], study.prompts)
    assert scores is not None
    return {
        "method": job.arm.method,
        "path": job.arm.path,
        "budget": job.budget,
        "seed": job.seed,
        "reward": [round(sample.reward, 5) for sample in samples],
        "heldout": scores,
        "nfe": [sample.nfe for sample in samples],
        "evaluations": [sample.evaluations for sample in samples],
        "reward_calls": [sample.reward_calls for sample in samples],
        "decodes": [sample.reward_calls + 1 for sample in samples],  # the sample that is handed out once more
        "unspent": [sample.unspent for sample in samples],
        "rows_padded": result.rows_padded,
        "seconds": result.seconds,
        "cpu_seconds": used,
        "search": planner.facts(job.arm, job.budget),
        "commit": commit(),
        "versions": result.versions,
    }


def picture_path(folder: Path, arm: Arm, budget: int, index: int) -> Path:
    return folder / "pictures" / f"{arm.method}-{arm.path}-{budget}" / f"{index:02d}.png"


def commit() -> str | None:
    """Of the source that runs, with a + where it was changed since; None: no git knows."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        name = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True).stdout
        changed = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return None
    return name.strip() + "+" * bool(changed.strip())
