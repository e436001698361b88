"""Time grids: the times s_0 > s_1 > ... > s_{S-1} > 0 of a path at which the model is evaluated.

S evaluations, one a step; the end s_S = 0 is implied, for x0_hat is the last step there. With i = 0..S-1:

| grid             | evaluations                                                                            |
|------------------|----------------------------------------------------------------------------------------|
| uniform          | s = 1 - i/S in the path's own time                                                     |
| paper            | s = sqrt(1 - (i/S)^2) in the path's own time (arXiv 2503.19385)                        |
| linear           | linear-equivalent t = 1 - i/S                                                          |
| shift[:MU]       | linear-equivalent t = e^mu / (e^mu + 1/f - 1), f = 1 - i/S: a model's own shift (FLUX) |
| ratio:R          | the same written t = R f / (1 + (R - 1) f), mu = log R (SD3)                           |
| window:HI:LO[:N] | linear-equivalent t: N times (default 1) from 1 towards HI, then uniform from HI to LO |
| times:S0,S1,...  | these times in the path's own time                                                     |
| linear-times:... | these linear-equivalent times                                                          |

Linear-equivalent t is sigma / (alpha + sigma). Where path or model do not reach pure noise (VP: t = 0.9935), the grids
given by a formula shrink to the range that both reach; explicit times are clamped to it.
"""

from __future__ import annotations

import itertools
import math

from flowfast.errors import OptionError
from flowfast.flow.interpolant import Interpolant
from flowfast.flow.option import parse_numbers

GRIDS = ("uniform", "paper", "linear", "shift", "ratio", "window", "times", "linear-times")
DEFAULT_STEPS = 10
MOST_STEPS = 10_000
_EARLIEST_START = 0.9
_LATEST = 1e-9  # linear t of the last evaluation: below it x is x0, and coefficients lose their digits


def grid_times(
    grid: str, steps: int | None, *, path: Interpolant, model: Interpolant, shift: float | None = None
) -> list[float]:
    """The grid's times in the path's own time, strictly falling, in (0, 1].

    steps: the number S of evaluations; None is 10, or the number of explicit times. shift: mu of a bare "shift".
    Raises OptionError for an unknown grid (naming the valid ones), wrong numbers, or times that do not fall.
    """
    times = _times(grid, steps, path=path, model=model, shift=shift)
    if any(after >= before for before, after in itertools.pairwise(times)):
        raise OptionError(f"grid {grid!r}: times must fall strictly, below the highest that path and model reach")
    if not times[-1] > 0.0 or path.sigma_t(times[-1]) < _LATEST or path.linear_time(times[-1]) < _LATEST:
        raise OptionError(f"grid {grid!r}: the last evaluation must stand at linear t >= {_LATEST}; end earlier")
    return times


def _times(grid: str, steps: int | None, *, path: Interpolant, model: Interpolant, shift: float | None) -> list[float]:
    name, _, rest = grid.partition(":")
    if name not in GRIDS:
        raise OptionError(f"unknown grid {name!r}; choose one of: {', '.join(GRIDS)}")
    if name in ("times", "linear-times"):
        return _explicit(grid, name, rest, steps, path=path, model=model)
    count = DEFAULT_STEPS if steps is None else steps
    if not 1 <= count <= MOST_STEPS:
        raise OptionError(f"steps must lie in 1..{MOST_STEPS}, got {count}")
    numbers = parse_numbers("grid", grid, rest.split(":") if rest else [])
    fractions = [(count - i) / count for i in range(count)]
    _check_count(grid, name, numbers)
    highest = _highest(path, model)
    if name == "uniform":
        return [highest * f for f in fractions]
    if name == "paper":
        return [highest * math.sqrt(1.0 - (i / count) ** 2) for i in range(count)]
    if name in ("shift", "ratio"):
        ratio = _shift_ratio(grid, name, numbers, shift)
        fractions = [ratio * f / (ratio * f + (1.0 - f)) for f in fractions]  # exactly 1 at f = 1
    elif name == "window":
        fractions = _window(grid, count, *numbers)
    top = path.linear_time(highest)
    return [highest if f == 1.0 else path.from_linear_time(top * f) for f in fractions]


def _highest(path: Interpolant, model: Interpolant) -> float:
    """The path's time of the lowest ratio alpha / sigma that both the path and the model reach."""
    return path.rho_inverse(max(path.rho(1.0), model.rho(1.0)))


def _check_count(grid: str, name: str, numbers: list[float]) -> None:
    low, high, form = {
        "shift": (0, 1, "shift or shift:MU"),
        "ratio": (1, 1, "ratio:R"),
        "window": (2, 3, "window:HI:LO or window:HI:LO:N"),
    }.get(name, (0, 0, name))
    if not low <= len(numbers) <= high:
        raise OptionError(f"grid {grid!r} has {len(numbers)} numbers; write it as {form}")


def _shift_ratio(grid: str, name: str, numbers: list[float], shift: float | None) -> float:
    if name == "ratio":
        if not numbers[0] > 0:
            raise OptionError(f"grid {grid!r}: the ratio must be > 0, got {numbers[0]}")
        return numbers[0]
    if not numbers and shift is None:
        raise OptionError('grid "shift" needs a model that has a shift of its own; give one as shift:MU')
    mu = numbers[0] if numbers else float(shift or 0.0)
    if not abs(mu) <= 20.0:
        raise OptionError(f"grid {grid!r}: mu must lie in [-20, 20], got {mu}")
    return math.exp(mu)


def _window(grid: str, count: int, high: float, low: float, leading: float = 1.0) -> list[float]:
    if not 0.0 < low < high < 1.0:
        raise OptionError(f"grid {grid!r}: expected 1 > HI > LO > 0, got HI = {high}, LO = {low}")
    if not (leading >= 1.0 and leading == int(leading)):
        raise OptionError(f"grid {grid!r}: N, the evaluations before HI, must be a whole number >= 1, got {leading}")
    before = min(int(leading), count)
    inside = count - before
    gap = (high - low) / max(inside - 1, 1)
    return [1.0 - (1.0 - high) * i / before for i in range(before)] + [high - gap * i for i in range(inside)]


def _explicit(
    grid: str, name: str, rest: str, steps: int | None, *, path: Interpolant, model: Interpolant
) -> list[float]:
    times = parse_numbers("grid", grid, rest.split(","))
    if steps is not None and steps != len(times):
        raise OptionError(f"grid {grid!r} has {len(times)} times but steps is {steps}; leave steps out")
    if not all(0.0 < time <= 1.0 for time in times):
        raise OptionError(f"grid {grid!r}: every time must lie in (0, 1]; the end 0 is implied")
    if name == "linear-times":
        times = [path.from_linear_time(time) for time in times]
    highest = _highest(path, model)
    times = [min(time, highest) for time in times]
    if path.linear_time(times[0]) < _EARLIEST_START:
        raise OptionError(
            f"grid {grid!r} starts at linear-equivalent t = {path.linear_time(times[0]):.3g}, where a sample is "
            f"no longer pure noise; start at 1"
        )
    return times
