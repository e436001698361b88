"""The one product of flowfast.flow: a table with a row per transition, in the model's own coordinates and time.

    x' = A x + B u + C z (+ G grad), then u' = velocity(x', t_to), then x0_hat = D x' + E u'

Row 0 is the initial noise (A = B = 0): its C is sqrt(alpha^2 + sigma^2) at the first time, the standard deviation
there of data with unit variance; on any path that is N(0, alpha_bar^2 + sigma_bar^2), so 1 wherever a path is walked
from noise. A sample is x0_hat at an evaluation with linear-equivalent t <= t_finish; no unevaluated last step exists.

Gradient guidance adds strength x grad to the score at the `from` point. The step is affine in u, so it becomes exactly
x' + G grad with G = strength B du/dscore; u itself stays the model's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.flow.grid import MOST_STEPS, grid_times
from flowfast.flow.integrator import ODE, Step, parse_integrator, renoise
from flowfast.flow.interpolant import Point, parse_interpolant

COLUMNS = ("A", "B", "C", "G", "D", "E", "D_from", "E_from")
TAIL_WIDTH = 0.12  # the widest step of an automatic tail, in linear t
_TIME_TOLERANCE = 1e-9  # float64 rounding of a time that is t_finish by construction
_INVISIBLE = 1e-6  # noise below this share of the state's scale is lost in float32: the transition counts as noise-free


@dataclass(frozen=True, eq=False)
class Schedule:
    """T transitions, float64, on the CPU.

    table (T, 8): columns A, B, C, G, D, E, D_from, E_from; D, E at the `to` time, D_from, E_from at the `from` time
    (0 at transition 0). G is 0 without gradient guidance. time, time_from (T,): model times. linear_time (T,): sigma /
    (alpha + sigma) at the `to` time. searchable (T,) bool: C != 0, children of one parent differ, transition 0
    included. finished (T,) bool: linear_time <= t_finish. passes (T,) int64: NFE of an evaluation, 2 where guidance
    needs the null condition; 1 everywhere if not given.
    """

    table: Tensor
    time: Tensor
    time_from: Tensor
    linear_time: Tensor
    searchable: Tensor
    finished: Tensor
    passes: Tensor = None  # type: ignore[assignment]  # filled in below

    def __post_init__(self) -> None:
        if self.passes is None:
            object.__setattr__(self, "passes", torch.ones_like(self.finished, dtype=torch.int64))
        T = self.table.shape[0]
        if T < 1 or self.table.shape != (T, len(COLUMNS)):
            raise OptionError(
                f"a schedule's table must be (T, {len(COLUMNS)}) with T >= 1, got {tuple(self.table.shape)}"
            )
        for name in ("time", "time_from", "linear_time", "searchable", "finished", "passes"):
            column = getattr(self, name)
            if column.shape != (T,):
                raise OptionError(f"a schedule's {name} must be ({T},), got {tuple(column.shape)}")
        if not bool(torch.isfinite(self.table.float()).all()):
            raise OptionError(
                "the schedule's coefficients overflow float32; lower the diffusion coefficient's norm, or the strength "
                "of gradient guidance"
            )
        if bool(self.table[0, :2].any()) or not bool(self.searchable[0]):
            raise OptionError("transition 0 of a schedule must be the initial noise: A = B = 0 and C != 0")

    @property
    def transitions(self) -> int:
        """T: the model evaluations of one trajectory."""
        return self.table.shape[0]

    @property
    def nfe(self) -> int:
        """Of one trajectory."""
        return int(self.passes.sum())

    @property
    def unit(self) -> int:
        """NFE that all evaluations cost alike; 1 where some cost more than others."""
        return math.gcd(*self.passes.tolist())

    def guided(self, interval: tuple[float, float] | None) -> Schedule:
        """With two passes where lo <= linear t <= hi, at all evaluations if None. Raises OptionError where there is
        none."""
        lo, hi = interval or (0.0, 1.0)
        inside = (self.linear_time >= lo - _TIME_TOLERANCE) & (self.linear_time <= hi + _TIME_TOLERANCE)
        if not bool(inside.any()):
            times = ", ".join(f"{time:.3g}" for time in self.linear_time.tolist())
            raise OptionError(
                f"guidance acts nowhere: no evaluation has a linear t in {lo:g}..{hi:g}, they stand at {times}: widen "
                "the interval, or switch guidance off with 1"
            )
        return replace(self, passes=torch.where(inside, 2, 1))


@dataclass(frozen=True, kw_only=True)
class ScheduleSpec:
    """What `build_schedule` needs, as text and numbers; the modules interpolant, diffusion, integrator and grid list
    names.

    model_interpolant: the path the model was trained on; interpolant: the path that is walked; diffusion: g, None for
    the integrator's default; steps: evaluations of the grid (None: 10, or the number of explicit times); tail: steps
    of the noise-free tail (None: as many as needed for steps of at most 0.12 in linear t); t_finish: linear t in [1e-4,
    1]; shift: mu of the model's own shift, for grid "shift"; strength: of gradient guidance, 0 for none.
    """

    model_interpolant: str = "linear"
    interpolant: str = "linear"
    diffusion: str | None = None
    integrator: str = "euler-maruyama"
    grid: str = "uniform"
    steps: int | None = None
    tail: int | None = None
    t_finish: float = 0.1
    shift: float | None = None
    strength: float = 0.0

    def __post_init__(self) -> None:
        if not 1e-4 <= self.t_finish <= 1.0:
            raise OptionError(f"t_finish must lie in [0.0001, 1], got {self.t_finish}")
        if self.tail is not None and not 0 <= self.tail <= MOST_STEPS:
            raise OptionError(f"tail must be None (automatic) or lie in 0..{MOST_STEPS}, got {self.tail}")


class SearchOverPaths(NamedTuple):
    """An unrolled search-over-paths schedule. Branching starts from the evaluation of transition `start`; a block is
    one transition up in t (the only noise) and some down without noise, and ends at an evaluation in `select`, where
    the best are kept."""

    schedule: Schedule
    start: int
    select: list[int]


def build_schedule(spec: ScheduleSpec) -> Schedule:
    """The schedule of one trajectory: initial noise, S - 1 transitions of the integrator along the grid, and the tail.

    The tail: when the grid's last evaluation stands at linear t > t_finish, steps without noise follow the linear path
    (Euler steps of equal width in linear t, the last evaluation exactly at t_finish); a grid that ends at t_finish or
    below gets none, whatever `tail` says. tail = 0 leaves the schedule without a finished transition. Raises
    OptionError for unknown names, invalid pairs and values out of range.
    """
    model, path = parse_interpolant(spec.model_interpolant), parse_interpolant(spec.interpolant)
    times = grid_times(spec.grid, spec.steps, path=path, model=model, shift=spec.shift)
    integrator = parse_integrator(
        spec.integrator, interpolant=spec.interpolant, diffusion=spec.diffusion, ceiling=times[min(1, len(times) - 1)]
    )
    points = [Point(model, path, s) for s in times]
    steps = [integrator.step(start, end) for start, end in zip(points[:-1], points[1:], strict=True)]
    return _assemble(spec, points, steps)


def search_over_paths_schedule(
    spec: ScheduleSpec,
    *,
    t_start: float,
    forward: float,
    backward: float,
    width: float = 0.1,
    rounds: int | None = None,
) -> SearchOverPaths:
    """Search over paths (Ma et al. 2025, arXiv 2501.09732): ODE from noise down to t_start; then blocks of one step up
    by `forward` (the forward process, fresh noise) and steps down by `backward`, until t_finish, where the last block
    ends.

    All times are linear-equivalent t; steps down are at most `width` wide and follow the spec's integrator with zero
    diffusion on the spec's path. rounds: at most so many blocks, then the tail as in `build_schedule`; None: as many as
    reach t_finish. The spec's diffusion, grid and steps do not apply. Raises OptionError for values that cannot work.
    """
    model, path = parse_interpolant(spec.model_interpolant), parse_interpolant(spec.interpolant)
    integrator = parse_integrator(spec.integrator, interpolant=spec.interpolant, diffusion="zero")
    top = Point(model, path, grid_times("linear", 1, path=path, model=model)[0])
    _check_paths(spec, top.linear_time, t_start, forward, backward, width, rounds)
    points, steps = [top], []

    def down(target: float) -> None:
        begin = points[-1].linear_time
        count = _count((begin - target) / width)
        for i in range(1, count + 1):
            end = Point(model, path, path.from_linear_time(_between(begin, target, i, count)))
            steps.append(integrator.step(points[-1], end))
            points.append(end)

    down(t_start)
    begin, t = len(points) - 1, t_start
    select: list[int] = []
    while t > spec.t_finish + _TIME_TOLERANCE and (rounds is None or len(select) < rounds):
        up = Point(model, path, path.from_linear_time(t + forward))
        steps.append(renoise(points[-1], up))
        points.append(up)
        t = max(t + forward - backward, spec.t_finish)
        down(t)
        select.append(len(points) - 1)
    return SearchOverPaths(_assemble(spec, points, steps), begin, select)


def _check_paths(
    spec: ScheduleSpec, top: float, t_start: float, forward: float, backward: float, width: float, rounds: int | None
) -> None:
    """Raises OptionError. top: the linear time of the initial noise."""
    if not spec.t_finish < t_start < top:
        raise OptionError(
            f"search over paths needs t_finish < t_start < {top:.4g}, got t_start = {t_start} and "
            f"t_finish = {spec.t_finish}"
        )
    if not 0.0 < forward < backward:
        raise OptionError(
            f"search over paths needs 0 < forward < backward, got forward = {forward}, backward = {backward}"
        )
    if not t_start + forward <= top:
        raise OptionError(
            f"search over paths needs t_start + forward <= {top:.4g}, got {t_start} + {forward}; lower one"
        )
    if not width > 0.0:
        raise OptionError(f"search over paths needs width > 0, got {width}")
    blocks = (t_start - spec.t_finish) / (backward - forward)
    if (1.0 + backward / width) * (blocks + 1.0) + 1.0 / width > MOST_STEPS:
        raise OptionError(
            f"search over paths needs more than {MOST_STEPS} transitions; raise backward - forward or width"
        )
    if rounds is not None and rounds < 1:
        raise OptionError(f"search over paths needs rounds None (until t_finish) or at least 1, got {rounds}")


def _count(widths: float) -> int:
    """The number of equal steps, at least 1, when the distance is so many of the widest."""
    return max(1, math.ceil(widths - _TIME_TOLERANCE))


def _between(begin: float, end: float, i: int, count: int) -> float:
    """Time i of `count` equal steps; exactly `end` at i = count."""
    return (begin * (count - i) + end * i) / count if i < count else end


def _assemble(spec: ScheduleSpec, points: Sequence[Point], steps: Sequence[Step]) -> Schedule:
    """Append the tail; put initial noise, transitions and evaluations into the table."""
    points, steps = list(points), list(steps)
    model, last = points[0].model, points[-1].linear_time
    if last > spec.t_finish + _TIME_TOLERANCE:
        count = _count((last - spec.t_finish) / TAIL_WIDTH) if spec.tail is None else spec.tail
        for i in range(1, count + 1):
            end = Point(model, model, model.from_linear_time(_between(last, spec.t_finish, i, count)))
            steps.append(ODE.step(points[-1], end))
            points.append(end)
    first = points[0]
    steps.insert(0, Step(0.0, 0.0, math.hypot(first.alpha_t, first.sigma_t)))
    starts = [first, *points[:-1]]
    table = []
    for k, (step, start, end) in enumerate(zip(steps, starts, points, strict=True)):
        noise = step.c if step.c > _INVISIBLE * end.sigma_t else 0.0
        before = start.x0_hat if k else (0.0, 0.0)
        gradient = spec.strength * step.b * start.velocity_of_score if k else 0.0
        table.append((step.a, step.b, noise, gradient, *end.x0_hat, *before))
    tensor = torch.tensor(table, dtype=torch.float64, device="cpu")
    linear_time = torch.tensor([point.linear_time for point in points], dtype=torch.float64, device="cpu")
    return Schedule(
        table=tensor,
        time=torch.tensor([point.t for point in points], dtype=torch.float64, device="cpu"),
        time_from=torch.tensor([point.t for point in starts], dtype=torch.float64, device="cpu"),
        linear_time=linear_time,
        searchable=tensor[:, 2] != 0,
        finished=linear_time <= spec.t_finish + _TIME_TOLERANCE,
    )
