"""Time grids against their formulas."""

import math

import pytest

from flowfast.errors import OptionError
from flowfast.flow import Interpolant, grid_times, parse_interpolant

LINEAR, VP = parse_interpolant("linear"), parse_interpolant("vp")


def times(
    grid: str,
    steps: int | None = None,
    path: Interpolant = LINEAR,
    model: Interpolant = LINEAR,
    shift: float | None = None,
) -> list[float]:
    return grid_times(grid, steps, path=path, model=model, shift=shift)


def test_uniform_in_the_paths_own_time() -> None:
    assert times("uniform") == [1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1]
    assert times("uniform", 4, path=VP) == [1.0, 0.75, 0.5, 0.25]


def test_paper_grid_is_the_published_one() -> None:
    """t_new = sqrt(1 - (1 - t)^2); on VP its ten evaluations stand at linear-equivalent t = .993 ... .709."""
    got = times("paper", 10, path=VP)
    assert got == pytest.approx([math.sqrt(1.0 - (1.0 - t / 10) ** 2) for t in range(10, 0, -1)], rel=1e-14)
    assert VP.linear_time(got[0]) == pytest.approx(0.9935, abs=1e-4)
    assert VP.linear_time(got[-1]) == pytest.approx(0.709, abs=5e-4)


def test_linear_grid_is_uniform_in_linear_equivalent_time() -> None:
    got = [VP.linear_time(s) for s in times("linear", 5, path=VP)]
    top = VP.linear_time(1.0)
    assert got == pytest.approx([top, 0.8 * top, 0.6 * top, 0.4 * top, 0.2 * top], rel=1e-12)


def test_shift_and_ratio_are_one_family() -> None:
    got = times("shift:1.15", 4)
    mu = math.exp(1.15)
    assert got == pytest.approx([mu / (mu + (1.0 / t - 1.0)) for t in (1.0, 0.75, 0.5, 0.25)], rel=1e-14)
    assert times("shift", 4, shift=1.15) == got
    assert times("ratio:3", 4) == pytest.approx([3 * t / (1 + 2 * t) for t in (1.0, 0.75, 0.5, 0.25)], rel=1e-14)
    assert times(f"shift:{math.log(3.0)!r}", 4) == pytest.approx(times("ratio:3", 4), rel=1e-14)
    assert times("shift:0", 7) == pytest.approx(times("linear", 7), rel=1e-14)


def test_window() -> None:
    assert times("window:0.7:0.3", 6) == pytest.approx([1.0, 0.7, 0.6, 0.5, 0.4, 0.3])
    assert times("window:0.7:0.3:2", 5) == pytest.approx([1.0, 0.85, 0.7, 0.5, 0.3])
    assert times("window:0.7:0.3", 2) == pytest.approx([1.0, 0.7])
    assert times("window:0.7:0.3", 1) == [1.0]


def test_explicit_times() -> None:
    assert times("times:1,.9,.5") == [1.0, 0.9, 0.5]
    assert [VP.linear_time(s) for s in times("linear-times:0.99,0.5", path=VP)] == pytest.approx([0.99, 0.5], rel=1e-12)
    assert times("linear-times:1,0.5", path=VP)[0] == 1.0  # clamped: this path reaches 0.9935 only


@pytest.mark.parametrize("model", ["linear", "vp", "vp:1:1"])
@pytest.mark.parametrize("path", ["linear", "vp", "trigonometric", "linear-vp", "polynomial:3"])
@pytest.mark.parametrize("grid", ["uniform", "paper", "linear", "shift:1.15", "shift:-1", "ratio:3", "window:0.6:0.3"])
def test_every_grid_falls_strictly_inside_what_both_reach(model: str, path: str, grid: str) -> None:
    a, b = parse_interpolant(path), parse_interpolant(model)
    for steps in (1, 2, 3, 10, 50):
        got = times(grid, steps, path=a, model=b)
        assert len(got) == steps
        assert all(after < before for before, after in zip(got[:-1], got[1:], strict=True))
        assert got[-1] > 0.0 and got[0] <= 1.0
        assert a.rho(got[0]) >= b.rho(1.0) * (1.0 - 1e-12)


@pytest.mark.parametrize(
    ("grid", "steps", "words"),
    [
        ("cosine", None, "choose one of: uniform, paper, linear, shift, ratio, window, times, linear-times"),
        ("uniform", 0, "1..10000"),
        ("uniform", 10**6, "1..10000"),
        ("times:1,1e-12", None, "linear t >= 1e-09"),
        ("uniform:3", None, "write it as uniform"),
        ("shift", None, "shift:MU"),
        ("shift:99", None, "-20, 20"),
        ("ratio", None, "write it as ratio:R"),
        ("ratio:-1", None, "> 0"),
        ("window:0.7", None, "window:HI:LO"),
        ("window:0.3:0.7", None, "HI > LO"),
        ("window:0.7:0.3:0", None, "whole number"),
        ("times:1,x", None, "finite number"),
        ("times:", None, "finite number"),
        ("times:1,0.5,0.5", None, "fall strictly"),
        ("times:1,0.5,0", None, "implied"),
        ("times:0.5,0.2", None, "start at 1"),
        ("times:1,0.5", 3, "leave steps out"),
    ],
)
def test_refusals(grid: str, steps: int | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        times(grid, steps)


@pytest.mark.parametrize("mu", [-2.375, -0.7, 0.3, 1.15])
def test_a_shifted_grid_starts_at_exactly_one(mu: float) -> None:
    """Written R f / (1 + (R - 1) f) it started at 1.0000000000000002 for some mu, where alpha is below 0."""
    assert times(f"shift:{mu}")[0] == 1.0
