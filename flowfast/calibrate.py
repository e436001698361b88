"""`flowfast calibrate`: runs whole trajectories of a model's plain ODE with their rewards at every transition, and
writes the bank (flowfast/calibration/bank.py).

Resumable: what one prompt found on one path is a line of FILE.rows.jsonl, a run with the same FILE goes on from there,
and at the end FILE is there whole and the lines are gone.
"""

from __future__ import annotations

import multiprocessing
import operator
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch

from flowfast import api, rewards, secrets
from flowfast.bounds import MOST_ROWS, Whole, Within
from flowfast.calibration import bank as banks
from flowfast.calibration.bank import Bank, BankPath
from flowfast.calibration.choose import LADDER, Chosen, Route, check_plain, choose, options_of, passes_of
from flowfast.config import Config, SearchConfig, SearchParams, make, make_config
from flowfast.errors import OptionError, OutputError, RewardError
from flowfast.files import locked_file
from flowfast.memory import keep_memory
from flowfast.prompts import check_prompts
from flowfast.report.write import Lines, damaged, json_line, read_lines
from flowfast.resolve import Resolved, resolve
from flowfast.types import WALK_OPTIONS, Candidate, Flow
from flowfast.version import versions

MOST_TRAJECTORIES = 25


class Calibration(Config):
    """What is run."""

    prompts: tuple[str, ...]
    model: str = "scenes"
    model_options: dict[str, Any] = {}
    reward: str = "scenes"
    paths: tuple[dict[str, Any], ...] = ({},)
    """Options of a search that say which path it walks, those of WALK_OPTIONS; the first one is the model's own."""
    chains: Annotated[int, Within(2, MOST_ROWS)] = 24
    """Trajectories of each prompt."""
    seed: Annotated[int, Whole()] = 0
    micro_batch: Annotated[int | None, Within(1, MOST_ROWS)] = None
    """Rows in one model call; default: those of a prompt, at most 32."""

    def params(self, path: dict[str, Any]) -> SearchParams:
        """Of the search along a path: every trajectory to its end, with all of its rewards. Raises OptionError."""
        options: dict[str, Any] = {"method": "bon", "seed": self.seed, "score_all": True}
        for name in path:
            if name not in WALK_OPTIONS:
                raise OptionError(f"unknown option {name!r} of a path: choose of {', '.join(WALK_OPTIONS)}")
        return make(SearchParams, options | path)

    def config(self, resolved: Resolved) -> SearchConfig:
        budget = self.chains * sum(passes_of(resolved))
        rows = self.micro_batch or -(-self.chains // -(-self.chains // 32))  # no row of a round is padding
        params = resolved.params.model_copy(update={"budget": budget, "finalists": None})
        own = {"model": self.model, "model_options": self.model_options, "reward": self.reward}
        run = {"micro_batch": rows, "cuda_graphs": False, "overlap": False}  # parts are timed apart
        return make_config(params.model_dump() | own | run)


class Job(NamedTuple):
    """One prompt on one path."""

    path: int
    prompt: int


def run(
    calibration: Calibration,
    flow: Flow,
    out: Path,
    on_job: Callable[[int, int, str], None] | None = None,
    workers: int = 1,
) -> Bank:
    """Runs what is missing, then writes the bank to `out`.

    Args:
        on_job: told (jobs done, jobs in all, which one).
        workers: processes, each with its share of the threads.

    Raises FlowfastError; OutputError where the lines beside `out` are of another calibration.
    """
    check_prompts(list(calibration.prompts))
    routes = [resolve(flow, calibration.params(path)) for path in calibration.paths]
    for route in routes:
        check_plain(route)
    with locked_file(out):
        facts = facts_of(calibration, flow, routes)
        rows = Rows(out, facts, routes)
        jobs = [Job(path, prompt) for prompt in range(len(calibration.prompts)) for path in range(len(routes))]
        missing = [job for job in jobs if job not in rows.found]
        for job, line in zip(missing, run_jobs(calibration, flow, missing, workers), strict=True):
            rows.add(job, line)
            if on_job:
                on_job(len(rows.found), len(jobs), f"path {job.path + 1} of {len(routes)}")
        bank = bank_of(facts, routes, rows.found)
        banks.write(out, bank)
        rows.remove()
    return bank


_work: tuple[Calibration, Flow]  # of a worker process


def run_jobs(calibration: Calibration, flow: Flow, jobs: Sequence[Job], workers: int) -> Iterator[dict[str, Any]]:
    """Lines, in the order of the jobs."""
    if workers == 1:
        yield from (run_job(calibration, flow, job) for job in jobs)
        return
    shared = (calibration, workers, secrets.GIVEN)
    with multiprocessing.get_context("spawn").Pool(workers, _start_worker, shared) as pool:
        yield from pool.imap(_run_in_worker, jobs)


def _start_worker(calibration: Calibration, workers: int, given: dict[str, Any]) -> None:
    global _work
    secrets.GIVEN.update(given)
    keep_memory()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // workers))
    _work = (calibration, api.load(calibration.model, **calibration.model_options))


def _run_in_worker(job: Job) -> dict[str, Any]:
    return run_job(*_work, job)


def run_job(calibration: Calibration, flow: Flow, job: Job) -> dict[str, Any]:
    """The line of one search: its rewards (n, T), and what the parts of its rounds took."""
    resolved = resolve(flow, calibration.params(calibration.paths[job.path]))
    found = np.full((calibration.chains, resolved.schedule.transitions), np.nan)
    seen = 0

    def note(candidates: list[Candidate]) -> None:
        nonlocal seen
        seen += len(candidates)
        for each in candidates:
            found[each.chain, each.transition] = np.nan if each.reward is None else each.reward

    prompt = calibration.prompts[job.prompt]
    result = api.search(flow, [prompt], config=calibration.config(resolved), on_round=note)
    return {
        "job": list(job),
        "rewards": numbers(found, prompt).tolist(),
        "seconds": {part: result.seconds[part] for part in ("model", "decode", "reward")},
        "rows": result.samples[0].nfe + result.rows_padded,
        "scored": seen,
    }


def numbers(found: np.ndarray, prompt: str) -> np.ndarray:
    """Rewards (n, T) without NaN and infinity: these rank last or first, as in a search. Raises RewardError where a
    transition has no number at all."""
    finite = np.isfinite(found)
    if not finite.any(0).all():
        at = int(np.flatnonzero(~finite.any(0))[0])
        raise RewardError(
            f"the reward has no number for any sample of prompt {prompt!r} at transition {at}: mend it, or leave the "
            "prompt out"
        )
    low, high = (np.where(finite, found, end).T for end in (np.inf, -np.inf))
    lowest, highest = low.min(1), high.max(1)
    return np.clip(np.where(np.isnan(found), -np.inf, found), lowest, highest)


def facts_of(calibration: Calibration, flow: Flow, routes: Sequence[Resolved]) -> dict[str, Any]:
    """What the bank says of itself, and what must be equal for a run to go on."""
    scorer = rewards.load(calibration.reward, flow)
    return {
        "model": secrets.without_login(calibration.model),
        "model_weights": banks.weights_of(flow),
        "reward": secrets.without_login(rewards.name_of(scorer)),
        "reward_weights": banks.weights_of(scorer),
        "prompts": list(calibration.prompts),
        "chains": calibration.chains,
        "seed": calibration.seed,
        "paths": [options_of(route) for route in routes],
        "noise_stream": versions()["noise_stream"],
    }


class Rows:
    """The lines beside a calibration that is not whole yet."""

    def __init__(self, out: Path, facts: dict[str, Any], routes: Sequence[Resolved]):
        """Raises OutputError where they are of another one, or damaged."""
        self.path = out.with_name(out.name + ".rows.jsonl")
        self.found: dict[Job, dict[str, Any]] = {}
        before = read_lines(self.path)
        if before and json_line(before[0]) != json_line(facts):
            head = before[0] if isinstance(before[0], dict) else {}
            other = [name for name in facts if json_line(head.get(name)) != json_line(facts[name])]
            raise OutputError(
                f"{self.path} is of a calibration with other {', '.join(other)}: remove it, or choose another --out"
            )
        for count, line in enumerate(before[1:], 2):
            try:
                self.found[checked(line, facts, routes)] = line
            except (KeyError, TypeError, ValueError, IndexError) as error:
                raise damaged(self.path, count, error) from None
        self.lines = Lines(self.path, sync=True)
        if not before:
            self.lines.add(facts)

    def add(self, job: Job, line: dict[str, Any]) -> None:
        self.lines.add(line)
        self.found[job] = line

    def remove(self) -> None:
        self.lines.close()
        self.path.unlink(missing_ok=True)


def checked(line: dict[str, Any], facts: dict[str, Any], routes: Sequence[Resolved]) -> Job:
    """Which job a line is of. Raises ValueError, ... where it does not say what it should."""
    job = Job(*map(operator.index, line["job"]))
    values = np.array(line["rewards"], dtype=np.float64)
    wanted = (facts["chains"], routes[job.path].schedule.transitions)
    if values.shape != wanted or not np.isfinite(values).all() or not 0 <= job.prompt < len(facts["prompts"]):
        raise ValueError(f"expected finite rewards {wanted} of a prompt, got {values.shape} of prompt {job.prompt}")
    times = [float(line["seconds"][part]) for part in ("model", "decode", "reward")]
    if min(*times, int(line["rows"]) - 1, int(line["scored"]) - 1) < 0:
        raise ValueError("expected positive counts and seconds")
    return job


def bank_of(facts: dict[str, Any], routes: Sequence[Resolved], lines: Mapping[Job, dict[str, Any]]) -> Bank:
    """All lines together."""

    def took(part: str, of: str) -> float:
        seconds = sum(line["seconds"][part] for line in lines.values())
        return banks.short(seconds / sum(line[of] for line in lines.values()))

    paths = [
        BankPath(
            options=options_of(route),
            linear_times=tuple(map(float, route.schedule.linear_time)),
            passes=tuple(passes_of(route)),
            rewards=[
                [list(map(banks.short, chain)) for chain in lines[Job(number, prompt)]["rewards"]]
                for prompt in range(len(facts["prompts"]))
            ],
        )
        for number, route in enumerate(routes)
    ]
    kept = ("model", "model_weights", "reward", "reward_weights", "prompts", "seed")
    return Bank(
        **{name: facts[name] for name in kept},
        seconds_row=took("model", "rows"),
        seconds_decode=took("decode", "scored"),
        seconds_reward=took("reward", "scored"),
        paths=tuple(paths),
        versions=versions(),
    )


def curve(calibration: Calibration, flow: Flow, bank: Bank) -> dict[int, Chosen]:
    """What budgets of one to 25 trajectories take, by budget; they rise by a quarter or more."""
    routes = [
        Route(path, resolve(flow, calibration.params(options)))
        for path, options in zip(bank.paths, calibration.paths, strict=True)
    ]
    least, budgets = bank.paths[0].nfe, list[int]()
    for budget in LADDER:
        if max(least, 1.25 * budgets[-1] if budgets else 0) <= budget <= MOST_TRAJECTORIES * least:
            budgets.append(budget)
    return {budget: choose(routes, budget) for budget in budgets}
