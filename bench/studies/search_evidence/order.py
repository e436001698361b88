"""The order in which searches run."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from bench.studies.search_evidence.design import ARMS, Arm, Job
from bench.studies.search_evidence.planner import Planner

RBF_VP = tuple(Arm(method, "vp") for method in ("rbf-margin0", "rbf-margin1"))
CLAIMS: tuple[tuple[tuple[Arm, ...], tuple[int, ...]], ...] = (
    ((Arm("bon", "base"), Arm("prune", "base")), (50, 100, 200)),
    ((Arm("bon", "fast"), Arm("prune", "fast"), Arm("auto", "fast")), (50, 100, 200)),
    ((Arm("auto", "base"),), (50, 100, 200)),
    (tuple(Arm(method, path) for path in ("base", "fast") for method in ("prune+pool", "bon+pool")), (50, 100, 200)),
    ((*RBF_VP, *(Arm(method, path) for path in ("fast", "base") for method in ("auto", "bon", "prune"))), (500,)),
)
"""(arms, budgets), the first to run first: what the claims need. All the rest comes after them."""


def order(planner: Planner, arms: Iterable[Arm] = ARMS) -> Iterator[Job]:
    """All jobs, each once: plain samples, which take seconds; those of the claims, each before the same arm at
    best-of-n's cost; the rest; last what the rest gets at best-of-n's cost."""
    study, wanted = planner.study, [arm for arm in arms if planner.why_not(arm) is None]
    seen = set[Job]()

    def new(jobs: Iterable[Job]) -> Iterator[Job]:
        for job in jobs:
            if job not in seen and planner.runs(job.arm, job.budget):
                seen.add(job)
                yield job

    def turn(of_arms: Iterable[Arm], budgets: Iterable[int], equal_nfe: bool, equal_cost: bool) -> Iterator[Job]:
        cases = [(arm, budget) for budget in budgets for arm in of_arms if arm in wanted]
        for seed in range(study.seeds):
            for arm, budget in cases:
                nfe = planner.at_cost(arm, budget) if equal_cost and arm.method != "ode" else None
                yield from [Job(arm, budget, seed)] if equal_nfe else []
                yield from [] if nfe is None else [Job(arm, nfe, seed)]

    plain = [arm for arm in wanted if arm.method == "ode"]  # one sample, whatever the budget
    yield from new(turn(plain, study.budgets[:1], True, False))
    for claimed, budgets in CLAIMS:
        yield from new(turn(claimed, [b for b in budgets if b in study.budgets], True, study.equal_cost))
    rest = [arm for arm in wanted if arm not in plain]
    yield from new(turn(rest, study.budgets, True, False))
    if study.equal_cost:
        yield from new(turn(rest, study.budgets, False, True))
