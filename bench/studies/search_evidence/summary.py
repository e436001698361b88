"""Rows into results: means over prompts and seeds, differences paired by prompt and seed, and the goals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from bench.studies.search_evidence.design import ARMS, BASELINE, Arm
from bench.studies.search_evidence.order import RBF_VP, order
from bench.studies.search_evidence.planner import Planner, Work
from bench.studies.search_evidence.run import Row, job_of
from flowfast.comparison.statistics import RESAMPLES, estimate

Estimate = dict[str, float] | None
WHAT = ("heldout", "reward")
LARGEST = 500
BEHIND = 0.03
AHEAD = {"base": (50, 100, 200), "fast": (50, 100)}
"""Where `auto` has to be ahead of best-of-n."""


class Case(NamedTuple):
    """An arm with a budget in NFE."""

    arm: Arm
    budget: int


@dataclass(frozen=True)
class Results:
    """The rows of one half of the prompts. Seeds of one prompt are not independent, so the bootstrap draws prompts, the
    same for every arm; a case counts with the seeds that are done, a difference with those that both sides have."""

    planner: Planner
    rows: Sequence[Row]

    @cached_property
    def found(self) -> dict[Case, dict[int, Row]]:
        cases: dict[Case, dict[int, Row]] = {}
        for row in self.rows:
            job = job_of(row)
            if job.seed < self.planner.study.seeds:
                cases.setdefault(Case(job.arm, job.budget), {})[job.seed] = row
        return cases

    @cached_property
    def draws(self) -> np.ndarray:
        """(resamples, prompts): the weight of each prompt."""
        prompts = len(self.planner.study.prompts)
        return np.random.default_rng(0).multinomial(prompts, np.full(prompts, 1 / prompts), RESAMPLES) / prompts

    def mean(self, case: Case, what: str) -> Estimate:
        """With its 95 % interval; None where nothing is done yet."""
        rows = self.found.get(case)
        return estimate(by_prompt(rows.values(), what), self.draws) if rows else None

    def minus(self, case: Case, other: Case, what: str = "heldout") -> Estimate:
        """The mean of case - other."""
        mine, theirs = self.found.get(case, {}), self.found.get(other, {})
        seeds = sorted(mine.keys() & theirs.keys())
        if not seeds or case == other:
            return None
        sides = (by_prompt([rows[seed] for seed in seeds], what) for rows in (mine, theirs))
        return estimate(next(sides) - next(sides), self.draws)

    def cheap(self, case: Case) -> Case | None:
        """The case of the same arm that costs no more than the baseline with this budget."""
        nfe = self.planner.at_cost(*case)
        return None if nfe is None else Case(case.arm, nfe)

    def missing(self) -> dict[str, str]:
        """Arms of which searches are not done, how many, or why the arm cannot run."""
        planner, lacking = self.planner, dict[str, str]()
        for arm in ARMS:
            why = planner.why_not(arm)
            if why is not None:
                lacking[str(arm)] = f"cannot run yet ({why.partition(': choose')[0]})"
                continue
            jobs = list(order(planner, [arm]))
            lost = [job for job in jobs if job.seed not in self.found.get(Case(arm, job.budget), {})]
            if lost:
                budgets = ", ".join(map(str, sorted({job.budget for job in lost})))
                lacking[str(arm)] = f"{len(lost)} of {len(jobs)} searches ({budgets} NFE)"
        return lacking


def by_prompt(rows: Any, what: str) -> np.ndarray:
    """(P,): means over the rows of several seeds."""
    return np.mean([row[what] for row in rows], axis=0, dtype=np.float64)


def lines_of(results: Results) -> list[dict[str, Any]]:
    """A line for each arm and budget that has rows."""
    study, lines, begun = results.planner.study, [], {case.arm for case in results.found}
    for arm in (arm for arm in ARMS if arm in begun):
        for budget in study.budgets[:1] if arm.method == "ode" else study.budgets:  # one sample, whatever the budget
            case, base = Case(arm, budget), Case(arm.baseline, budget)
            line = line_of(results, case, base)
            cheap = results.cheap(case) if study.equal_cost and arm.method not in ("ode", BASELINE) else None
            line["at_cost"] = None if cheap is None or cheap not in results.found else line_of(results, cheap, base)
            if case in results.found or line["at_cost"]:
                lines.append(line)
    return lines


def line_of(results: Results, case: Case, base: Case) -> dict[str, Any]:
    """What one case was, and its difference from best-of-n."""
    rows = list(results.found.get(case, {}).values())
    work = Work(*(per_prompt(rows, what) for what in ("nfe", "reward_calls", "decodes"))) if rows else None
    compares = case.arm.method != "ode"
    return {
        "method": case.arm.method,
        "path": case.arm.path,
        "budget": case.budget,
        "seeds": len(rows),
        **{what: results.mean(case, what) for what in WHAT},
        "difference": {what: results.minus(case, base, what) for what in WHAT} if compares else None,
        "nfe": work and work.nfe,
        "rewards": work and work.rewards,
        "decodes": work and work.decodes,
        "cost_ms": work and results.planner.costs.of(work),
        "unspent": per_prompt(rows, "unspent") if rows else None,
        "filled": filled(rows) if rows else None,
        "seconds": median_of(rows, lambda row: row["seconds"]["total"]),
        "cpu_seconds": median_of(rows, lambda row: row["cpu_seconds"]),
    }


def per_prompt(rows: Sequence[Row], what: str) -> float:
    return float(np.mean([row[what] for row in rows]))


def filled(rows: Sequence[Row]) -> float:
    """The share of the rows through the model that were no padding."""
    used, padded = sum(sum(row["nfe"]) for row in rows), sum(row["rows_padded"] for row in rows)
    return used / (used + padded)


def median_of(rows: Sequence[Row], seconds: Callable[[Row], float]) -> float | None:
    """Seconds a prompt."""
    return float(np.median([seconds(row) / len(row["nfe"]) for row in rows])) if rows else None


# ---- the goals ----


def goals(results: Results, tuning: Results | None) -> list[dict[str, Any]]:
    """What the study has to show: for each the difference, and whether it is reached (None: not known yet)."""
    return [*ahead(results), *against_rbf(results), *against_all(results, tuning), *never_behind(results)]


def goal(
    what: str, criterion: str, difference: Estimate, reached: Callable[[dict[str, float]], bool]
) -> dict[str, Any]:
    done = None if difference is None else reached(difference)
    return {"what": what, "criterion": criterion, "difference": difference, "reached": done}


def ahead(results: Results) -> Iterator[dict[str, Any]]:
    """`auto` against best-of-n on the same path."""
    for path, budgets in AHEAD.items():
        for budget in budgets:
            arm, base = Arm("auto", path), Arm(BASELINE, path)
            yield from both(results, arm, base, budget, "interval above 0", lambda found: found["low"] > 0)


def both(
    results: Results, arm: Arm, base: Arm, budget: int, criterion: str, reached: Callable[[dict[str, float]], bool]
) -> Iterator[dict[str, Any]]:
    """One goal at equal NFE and at equal cost."""
    for how, case in at_both(results, arm, budget):
        difference = results.minus(case, Case(base, budget)) if case else None
        yield goal(f"{arm} - {base}, {budget} NFE, {how}", criterion, difference, reached)


def at_both(results: Results, arm: Arm, budget: int) -> list[tuple[str, Case | None]]:
    """The case at equal NFE and the one at equal cost; None where it cannot run."""
    if results.planner.why_not(arm) is not None:
        return [("equal NFE", None), ("equal cost", None)]
    case = Case(arm, budget)
    cheap = results.cheap(case)
    return [("equal NFE", case), (f"equal cost ({cheap.budget} NFE)" if cheap else "equal cost", cheap)]


def against_rbf(results: Results) -> Iterator[dict[str, Any]]:
    """`auto` on the fast path at 200 NFE against RBF on the VP path at 500."""
    for rbf in RBF_VP:
        difference = results.minus(Case(Arm("auto", "fast"), 200), Case(rbf, LARGEST))
        what = f"auto/fast 200 NFE - {rbf} {LARGEST} NFE"
        yield goal(what, "interval not below 0", difference, lambda found: found["high"] >= 0)


def against_all(results: Results, tuning: Results | None) -> Iterator[dict[str, Any]]:
    """`auto` against the best of the others with 500 NFE. Both are chosen on the tuning half."""
    auto, other = (tuning and best_at(tuning, LARGEST, own) for own in (True, False))
    what = f"{auto or 'auto'} - {other or 'the best other method'}, {LARGEST} NFE, chosen on the tuning half"
    difference = results.minus(Case(auto, LARGEST), Case(other, LARGEST)) if auto and other else None
    yield goal(what, f"mean above -{BEHIND:.2f}", difference, lambda found: found["mean"] > -BEHIND)


def best_at(results: Results, budget: int, auto: bool) -> Arm | None:
    """The arm with the largest held-out share: of `auto`, or of the others. None until all of them are done."""
    arms = [arm for arm in ARMS if (arm.method == "auto") == auto and arm.method != "ode"]
    shares = [results.mean(Case(arm, budget), "heldout") for arm in arms]
    if any(share is None for share in shares):
        return None
    return max(zip(arms, shares, strict=True), key=lambda each: each[1]["mean"] if each[1] else 0.0)[0]


def never_behind(results: Results) -> Iterator[dict[str, Any]]:
    """On no path and at no budget is `auto` behind best-of-n by more than the interval; where it has to be ahead,
    `ahead` says so."""
    for path, told in AHEAD.items():
        arm, base = Arm("auto", path), Arm(BASELINE, path)
        for budget in (budget for budget in results.planner.study.budgets if budget not in told):
            yield from both(results, arm, base, budget, "interval not below 0", lambda found: found["high"] >= 0)
