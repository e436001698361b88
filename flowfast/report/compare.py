"""`flowfast compare`: every method on the same prompts and seeds, at equal budgets, with intervals.

Fair: one micro-batch for all arms, many prompts a call, and the arms take turns chunk by chunk, each time in another
order, so that a machine that slows down slows all of them. Resumable: a finished chunk is a line of rows.jsonl, and a
run into the same folder goes on from there.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from flowfast import engine, presets, rewards, secrets
from flowfast.config import SearchConfig, make_config
from flowfast.errors import FlowfastError, OptionError, OutputError
from flowfast.files import locked_folder, sweep
from flowfast.memory import keep_memory
from flowfast.prompts import check_each, encoded
from flowfast.report.heldout import heldout
from flowfast.report.pictures import base_of, contact_picture, curve_picture
from flowfast.report.tables import HEAD, comparison_rows, markdown, overview
from flowfast.report.write import (
    Lines,
    check_places,
    damaged,
    drawn,
    number,
    read_lines,
    read_picture,
    write_bytes,
    write_json,
    write_picture,
    write_text,
)
from flowfast.types import Flow

BASELINE = "bon"
PICTURES = 8  # prompts on the contact sheet
RESAMPLES = 10_000


class Arm(NamedTuple):
    """One thing that is compared: a method ("rbf", or steered by a gradient, "rbf+dps:1") on a path with a budget in
    NFE or in seconds a prompt."""

    method: str
    interpolant: str
    budget: int | None
    seconds: float | None

    @property
    def slug(self) -> str:
        return f"{self.method}-{self.interpolant}-{self.amount}".replace(":", "_").replace(" ", "")

    @property
    def amount(self) -> str:
        return f"{self.budget} NFE" if self.budget is not None else f"{self.seconds:g} s"


@dataclass(frozen=True)
class Comparison:
    """What is compared. The folder of a run remembers it: another comparison is refused there."""

    prompts: tuple[str, ...]
    methods: tuple[str, ...] = ("ode", "bon", "sop", "smc", "code", "svdd", "rbf")
    budgets: tuple[int, ...] = (100, 200, 500)
    seconds: tuple[float, ...] = ()
    interpolants: tuple[str, ...] = ("linear",)
    """Interpolants, or names of presets ("paper")."""
    seeds: int = 3
    chunk: int = 16
    """Prompts in one search call."""
    model: str = "scenes"
    reward: str = "scenes"
    steps: int | None = None
    micro_batch: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", secrets.sealed(self.reward))

    def arms(self) -> list[Arm]:
        """All arms. "ode" needs no budget: it is one sample, so it is run once, on the model's own path."""
        amounts = [(budget, None) for budget in self.budgets] + [(None, seconds) for seconds in self.seconds]
        found = []
        for method in self.methods:
            for path in self.interpolants:
                if base_of(method) == "ode":
                    found += [Arm(method, path, self.budgets[0], None)] if path == self.interpolants[0] else []
                else:
                    found += [Arm(method, path, budget, seconds) for budget, seconds in amounts]
        return found

    def config(self, arm: Arm, seed: int) -> SearchConfig:
        """The search of one arm. Raises OptionError."""
        method, steered, gradient = arm.method.partition("+")
        path = {"preset" if arm.interpolant in presets.PRESETS else "interpolant": arm.interpolant}
        return make_config(
            {
                "model": self.model,
                "reward": self.reward,
                "method": method,
                "gradient": gradient if steered else None,
                "budget": arm.budget,
                "seconds": arm.seconds,
                "steps": self.steps,
                "seed": seed,
                "micro_batch": self.micro_batch,
                "slots": self.chunk,
                **path,
            }
        )

    def jobs(self) -> Iterator[Job]:
        """(arm, seed, chunk of prompts) in the order they run: arms innermost, each time starting with another."""
        arms, turn = self.arms(), 0
        for seed in range(self.seeds):
            for start in range(0, len(self.prompts), self.chunk):
                for k in range(len(arms)):
                    yield arms[(turn + k) % len(arms)], seed, self.prompts[start : start + self.chunk]
                turn += 1


def fitting_batch(prompts: int) -> int:
    """Rows of one model call that `prompts` prompts with two chains each fill: a power of two, at most 32."""
    return min(32, 1 << max(0, 2 * prompts - 1).bit_length())


def check(comparison: Comparison, flow: Flow) -> None:
    """Raises a FlowfastError that names the arm unless every arm can run."""
    for name in ("prompts", "methods", "interpolants"):
        if not getattr(comparison, name):
            raise OptionError(f"expected at least one of --{name}, got none")
    if not comparison.budgets and not comparison.seconds:
        raise OptionError("expected at least one of --budgets or --seconds, got neither")
    if comparison.seeds < 1 or comparison.chunk < 1:
        raise OptionError(f"--seeds and --chunk must be at least 1, got {comparison.seeds} and {comparison.chunk}")
    if not comparison.budgets and "ode" in map(base_of, comparison.methods):
        raise OptionError("method 'ode' needs one of --budgets: add one, or leave it out of --methods")
    secrets.opened(comparison.reward)
    encoded(flow.encode, list(comparison.prompts))
    reward = rewards.load(comparison.reward, flow)
    if rewards.on_host(reward):
        check_each(comparison.prompts, reward.check)
    for arm in comparison.arms():
        try:
            setup = engine.Setup(flow, comparison.config(arm, 0))
            if arm.budget is not None:
                setup.plan(arm.budget)
        except FlowfastError as error:
            raise type(error)(f"{arm.method} on {arm.interpolant} at {arm.amount}: {error}") from None


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


Job = tuple[Arm, int, tuple[str, ...]]
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
    _work = (comparison, engine.load(comparison.model), out)


def _run_in_worker(job: Job) -> dict[str, Any]:
    comparison, flow, out = _work
    return run_job(comparison, flow, *job, out)


def run_job(
    comparison: Comparison, flow: Flow, arm: Arm, seed: int, prompts: tuple[str, ...], out: Path
) -> dict[str, Any]:
    """One search call; the pictures of the contact sheet go to `out`/pictures. Returns the line for rows.jsonl."""
    result = engine.search(flow, list(prompts), config=comparison.config(arm, seed))
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


def summarise(comparison: Comparison, lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row per arm: means over prompts and seeds with 95 % intervals, and the paired difference from best-of-n.

    Seeds of one prompt are not independent, so prompts are what the bootstrap draws; the same draws for every arm.
    The baseline of an arm is best-of-n with the same budget on the first path of --interpolants.
    """
    draws = np.random.default_rng(0).multinomial(
        len(comparison.prompts), np.full(len(comparison.prompts), 1 / len(comparison.prompts)), size=RESAMPLES
    ) / len(comparison.prompts)
    wanted = set(comparison.jobs())
    lines = [line for line in lines if (Arm(*line["arm"]), line["seed"], tuple(line["prompts"])) in wanted]
    rows = []
    for arm in comparison.arms():
        own = [line for line in lines if Arm(*line["arm"]) == arm]
        baseline = arm._replace(method=BASELINE, interpolant=comparison.interpolants[0])
        base = [line for line in lines if Arm(*line["arm"]) == baseline]
        seconds = [line["seconds"]["total"] / len(line["prompts"]) for line in own]
        values = {what: by_prompt(comparison, own, what) for what in ("reward", "heldout")}
        against = {what: by_prompt(comparison, base, what) for what in ("reward", "heldout")} if base else None
        rows.append(
            {
                **arm._asdict(),
                "prompts": len(comparison.prompts),
                "seeds": comparison.seeds,
                "reward": estimate(values["reward"], draws),
                "heldout": estimate(values["heldout"], draws),
                "difference": None
                if against is None or arm == baseline
                else {
                    what: None if value is None else estimate(value - against[what], draws)
                    for what, value in values.items()
                },
                "nfe": float(np.mean([n for line in own for n in line["nfe"]])),
                "unspent": float(np.mean([n for line in own for n in line["unspent"]])),
                "seconds_per_prompt": float(
                    np.median([line["seconds"]["total"] / len(line["prompts"]) for line in own])
                ),
                "worst_seconds_per_prompt": max(seconds),
            }
        )
    return rows


def by_prompt(comparison: Comparison, lines: Sequence[dict[str, Any]], what: str) -> Any:
    """float64 (prompts,): the mean over seeds of one arm; None where it was not measured."""
    found: dict[str, list[float]] = {prompt: [] for prompt in comparison.prompts}
    for line in lines:
        if line[what] is None:
            return None
        for prompt, value in zip(line["prompts"], line[what], strict=True):
            found[prompt].append(value)
    return np.array([np.mean(found[prompt]) for prompt in comparison.prompts], dtype=np.float64)


def estimate(values: Any, draws: np.ndarray) -> dict[str, float] | None:
    """Mean of values (P,) and its 95 % percentile interval over draws (R, P), each row the weights of one resample."""
    if values is None:
        return None
    low, high = np.quantile(draws @ values, [0.025, 0.975])
    return {"mean": float(values.mean()), "low": float(low), "high": float(high)}


def write_results(
    comparison: Comparison, results: list[dict[str, Any]], lines: Sequence[dict[str, Any]], out: Path
) -> None:
    machine = {"processor": processor(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    head = {
        "comparison": asdict(comparison),
        "interval": f"95 %, percentile bootstrap over prompts, {RESAMPLES} resamples",
        "machine": machine,
        "versions": lines[-1]["versions"],
    }
    write_json(out / "results.json", {**head, "rows": results})
    write_text(out / "table.md", overview(results) + "\n" + markdown(HEAD, comparison_rows(results)))
    what = "reward" if results[0]["heldout"] is None else "heldout"
    curve, contact, again = out / "curve.png", out / "contact.png", f"flowfast compare ... --out {out}"
    drawn(curve, lambda: write_bytes(curve, curve_picture(results, what)), again)
    drawn(contact, lambda: write_bytes(contact, contact_sheet(comparison, lines, out)), again)


def contact_sheet(comparison: Comparison, lines: Sequence[dict[str, Any]], out: Path) -> bytes:
    """The first prompts, seed 0, every method and path at the largest budget."""
    arms = [arm for arm in comparison.arms() if base_of(arm.method) == "ode" or arm[2:] == largest(comparison)]
    prompts = comparison.prompts[:PICTURES]
    found: dict[tuple[Arm, str], tuple[float, float | None]] = {}
    for line in lines:
        if line["seed"] == 0:
            scores = line["heldout"] or [None] * len(line["prompts"])
            for prompt, reward, score in zip(line["prompts"], line["reward"], scores, strict=True):
                found[Arm(*line["arm"]), prompt] = (reward, score)
    cells: list[list[tuple[np.ndarray, float, float | None] | None]] = []
    for index, prompt in enumerate(prompts):
        images = [read_picture(picture_path(out, arm, index)) for arm in arms]
        row = zip(arms, images, strict=True)
        cells.append([None if image is None else (image, *found[arm, prompt]) for arm, image in row])
    several = len(comparison.interpolants) > 1
    names = [f"{a.method}\n{a.interpolant}" if several else a.method for a in arms]
    return contact_picture(prompts, names, cells)


def largest(comparison: Comparison) -> tuple[int | None, float | None]:
    return (max(comparison.budgets), None) if comparison.budgets else (None, max(comparison.seconds))


def picture_path(out: Path, arm: Arm, index: int) -> Path:
    return out / "pictures" / arm.slug / f"{index:02d}.png"


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


def processor() -> str:
    """What the machine's processor is called."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
