"""The table against step-by-step simulation in the converted path's coordinates, its law (testing.md C2), its ends,
the tail, search over paths."""

import itertools
import math
from collections.abc import Iterable
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.flow import (
    COLUMNS,
    COMBINATIONS,
    DIFFUSIONS,
    GRIDS,
    INTERPOLANTS,
    Interpolant,
    Schedule,
    ScheduleSpec,
    build_schedule,
    grid_times,
    parse_diffusion,
    parse_interpolant,
    search_over_paths_schedule,
)
from tests.flow import textbook
from tests.flow.textbook import Converted
from tests.problems import GaussianMixture, two_dimensions, two_modes

PATHS = ["linear", "vp", "trigonometric", "linear-vp", "polynomial:2"]
SETTINGS = [(name, g) for name in ("euler-maruyama", "exponential") for g in DIFFUSIONS] + [
    ("coefficient-preserving:0.3", None),
    ("coefficient-preserving:1", None),
    ("coefficient-preserving", "zero"),
    ("flow-grpo", None),
    ("flow-grpo:1.2", None),
    ("flow-grpo", "zero"),
]


def combinations() -> list[tuple[str, str, str | None]]:
    """Every valid (interpolant, integrator, diffusion)."""
    return [
        (path, name, g)
        for path, (name, g) in itertools.product(PATHS, SETTINGS)
        if path in (COMBINATIONS[name.split(":")[0]].interpolants or PATHS)
    ]


def table_trajectory(schedule: Schedule, model: str, noise: Tensor) -> list[Tensor]:
    """x after every transition, in the model's coordinates, with a perfect model of the mixture; noise (T, N, d)."""
    path, x, u, states = parse_interpolant(model), torch.zeros_like(noise[0]), torch.zeros_like(noise[0]), []
    for k in range(schedule.transitions):
        a, b, c = schedule.table[k, :3].tolist()
        x = a * x + b * u + c * noise[k]
        u = two_dimensions().velocity(x, float(schedule.time[k]), path)
        states.append(x)
    return states


def textbook_step(
    start: Converted, end: Converted, x: Tensor, z: Tensor, name: str, g: str | None, second: float
) -> Tensor:
    name, *number = name.split(":")
    if name == "coefficient-preserving":
        return textbook.coefficient_preserving(start, end, x, z, 0.0 if g else float(number[0] if number else 0.5))
    if name == "flow-grpo":
        return textbook.flow_grpo(start, end, x, z, 0.0 if g else float(number[0] if number else 0.7), second)
    diffusion = parse_diffusion(g or "square:3")
    if name == "euler-maruyama":
        return textbook.euler_maruyama(start, end, x, z, diffusion.g_t(start.s, start.path))
    return textbook.exponential(start, end, x, z, diffusion)


@pytest.mark.parametrize("model", ["linear", "vp", "trigonometric"])
@pytest.mark.parametrize(("path", "integrator", "diffusion"), combinations())
@pytest.mark.parametrize("grid", ["uniform", "window:0.7:0.3"])
def test_table_is_the_textbook_in_other_coordinates(
    model: str, path: str, integrator: str, diffusion: str | None, grid: str
) -> None:
    """A trajectory of the converted path, stepped by the published formulas (c', t', the score from the velocity), maps
    back to the table's trajectory, with the same noise."""
    spec = ScheduleSpec(
        model_interpolant=model,
        interpolant=path,
        integrator=integrator,
        diffusion=diffusion,
        grid=grid,
        steps=5,
        tail=0,
    )
    a, b = parse_interpolant(model), parse_interpolant(path)
    times = grid_times(grid, 5, path=b, model=a)
    noise = torch.randn(5, 20, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    schedule = build_schedule(spec)
    states = table_trajectory(schedule, model, noise)
    points = [Converted(two_dimensions(), a, b, s) for s in times]
    x_bar = math.hypot(b.alpha_t(times[0]), b.sigma_t(times[0])) * noise[0]
    for k, point in enumerate(points):
        if k:
            x_bar = textbook_step(points[k - 1], point, x_bar, noise[k], integrator, diffusion, times[1])
        scale = max(1.0, float(x_bar.abs().max()))
        # The exponential's integral is Simpson's here; noise below 1e-6 is left out of the table ("exp").
        tolerance = 1e-5 if integrator == "exponential" or diffusion == "exp" else 1e-9
        assert float((point.c * states[k] - x_bar).abs().max()) < tolerance * scale
        d, e = schedule.table[k, 4:6].tolist()
        u = two_dimensions().velocity(states[k], float(schedule.time[k]), a)
        assert float((d * states[k] + e * u - point.x0_hat(x_bar)).abs().max()) < tolerance * scale
        if k:
            assert torch.equal(schedule.table[k, 6:8], schedule.table[k - 1, 4:6])
            assert float(schedule.time_from[k]) == float(schedule.time[k - 1])


class Guided(GaussianMixture):
    """The mixture with the score shifted by sin(x), put through x_t = alpha x0_hat + sigma eps_hat by hand."""

    def velocity(self, x: Tensor, t: float | Tensor, path: Interpolant) -> Tensor:
        assert isinstance(t, float)
        alpha, sigma = path.alpha_t(t), path.sigma_t(t)
        if not alpha:  # x is noise alone: nothing can steer it
            return super().velocity(x, t, path)
        score = self.score(x, t, path) + 0.7 * torch.sin(x)
        eps_hat = -sigma * score
        return path.d_alpha_t(t) * (x - sigma * eps_hat) / alpha + path.d_sigma_t(t) * eps_hat


@pytest.mark.parametrize("model", ["linear", "vp", "trigonometric"])
@pytest.mark.parametrize(("path", "integrator", "diffusion"), combinations())
def test_the_column_g_is_the_guided_score_in_every_step(
    model: str, path: str, integrator: str, diffusion: str | None
) -> None:
    """One step of the table with G against the textbook's step with the guided velocity, at each of them. sin(x) stands
    for the gradient in the model's coordinates."""
    spec = ScheduleSpec(
        model_interpolant=model, interpolant=path, integrator=integrator, diffusion=diffusion, steps=5, tail=0,
        strength=0.7,
    )  # fmt: skip
    a, b = parse_interpolant(model), parse_interpolant(path)
    times = grid_times("uniform", 5, path=b, model=a)
    table = build_schedule(spec).table
    plain, generator = two_dimensions(), torch.Generator().manual_seed(0)
    guided = Guided(plain.weights, plain.means, plain.stds)
    x, z = (torch.randn(20, 2, dtype=torch.float64, generator=generator) for _ in range(2))
    for k in range(1, 5):
        start, end = (Converted(guided, a, b, times[j]) for j in (k - 1, k))
        c_a, c_b, c_c, c_g = table[k, :4].tolist()
        found = c_a * x + c_b * plain.velocity(x, start.t, a) + c_c * z + c_g * torch.sin(x)
        expected = textbook_step(start, end, start.c * x, z, integrator, diffusion, times[1]) / end.c
        tolerance = 1e-5 if integrator == "exponential" or diffusion == "exp" else 1e-9
        assert float((found - expected).abs().max()) < tolerance * max(1.0, float(expected.abs().max()))
        assert (c_g == 0) == (a.alpha_t(start.t) == 0 or c_b == 0)
    assert build_schedule(replace(spec, strength=0.0)).table[:, :3].equal(table[:, :3])
    assert not bool(build_schedule(replace(spec, strength=0.0)).table[:, 3].any())


def test_search_over_paths_is_steered_on_its_way_down_only() -> None:
    """Up in t the forward process adds noise to x: no score is in it."""
    spec = ScheduleSpec(strength=2.0)
    schedule, start, _ = search_over_paths_schedule(spec, t_start=0.5, forward=0.2, backward=0.3)
    up = schedule.time > schedule.time_from
    assert int(up.sum()) > 1 and not bool(schedule.table[up, 3].any())
    down = ~up & (schedule.time_from < 1)
    assert bool((schedule.table[down, 3] > 0).all()), "t falls: B < 0, and so is du/dscore"


def converted_law(path: str, name: str, times: list[float], x: Tensor, sign: float = 1.0) -> Tensor:
    """Density of x_bar at the last time by quadrature of the textbook's steps."""
    a, b, mixture = parse_interpolant("linear"), parse_interpolant(path), two_modes()
    density = torch.exp(-(x**2) / 2.0)
    density = density / (density.sum() * (x[1] - x[0]))
    points = [Converted(mixture, a, b, s) for s in times]
    g = parse_diffusion("square:3")
    for start, end in itertools.pairwise(points):
        column = x[:, None]
        if name == "euler-maruyama":
            step = [textbook.euler_maruyama(start, end, column, z, g.g_t(start.s, b), sign) for z in (0.0, 1.0)]
        elif name == "exponential":
            step = [textbook.exponential(start, end, column, z, g) for z in (0.0, 1.0)]
        else:
            step = [textbook.coefficient_preserving(start, end, column, z, 0.5) for z in (0.0, 1.0)]
        density = textbook.propagate(density, step[0][:, 0], float((step[1] - step[0])[0, 0]), x)
    return density


def sample_end(schedule: Schedule, count: int) -> Tensor:
    """x at the last evaluation, sorted; linear model of `two_modes`."""
    generator, path = torch.Generator().manual_seed(7), parse_interpolant("linear")
    x = u = torch.zeros(count, 1, dtype=torch.float64)
    for k in range(schedule.transitions):
        a, b, c = schedule.table[k, :3].tolist()
        x = a * x + b * u + c * torch.randn(count, 1, dtype=torch.float64, generator=generator)
        if k + 1 < schedule.transitions:
            u = two_modes().velocity(x, float(schedule.time[k]), path)
    return x[:, 0].sort().values


def distance(samples: Tensor, density: Tensor, x: Tensor) -> float:
    """Kolmogorov-Smirnov distance of sorted samples from a density on x."""
    cdf = torch.cumulative_trapezoid(density, x)
    position = torch.searchsorted(x, samples).clamp(1, len(x) - 1)
    share = (samples - x[position - 1]) / (x[1] - x[0])
    padded = torch.cat([torch.zeros(1, dtype=torch.float64), cdf])
    model = padded[position - 1] * (1.0 - share) + padded[position] * share
    empirical = torch.arange(len(samples) + 1, dtype=torch.float64) / len(samples)
    return float(torch.maximum((empirical[1:] - model).abs(), (empirical[:-1] - model).abs()).max())


@pytest.mark.parametrize("path", ["linear", "vp"])
@pytest.mark.parametrize("name", ["euler-maruyama", "exponential", "coefficient-preserving"])
def test_sampler_has_the_discretised_law(path: str, name: str) -> None:
    """C2: 2e5 samples within the DKW band (alpha = 1e-6) of the quadrature; outside it: the flipped score (24 times the
    variance), a wrong conversion scale, and the continuous law, from which ten steps differ by more than the band."""
    count = 200_000
    band = math.sqrt(math.log(2.0 / 1e-6) / (2.0 * count))
    spec = ScheduleSpec(interpolant=path, integrator=name, grid="paper", tail=0)
    schedule = build_schedule(spec)
    a, b = parse_interpolant("linear"), parse_interpolant(path)
    times = grid_times("paper", 10, path=b, model=a)
    end = Converted(two_modes(), a, b, times[-1])
    samples = end.c * sample_end(schedule, count)
    x = torch.linspace(-8.0, 8.0, 1001, dtype=torch.float64)
    assert distance(samples, converted_law(path, name, times, x), x) < band
    continuous = torch.exp(two_modes().marginal(b.alpha_t(times[-1]), b.sigma_t(times[-1])).log_density(x[:, None]))
    assert distance(samples, continuous, x) > band
    assert distance(samples * 1.03, converted_law(path, name, times, x), x) > band
    if name == "euler-maruyama":
        wide = torch.linspace(-60.0, 60.0, 2001, dtype=torch.float64)
        flipped = converted_law(path, name, times, wide, sign=-1.0)
        assert distance(samples, flipped, wide) > 10.0 * band


FORMULA_GRIDS = ["uniform", "paper", "linear", "shift:1.15", "ratio:3", "window:0.7:0.3"]


@pytest.mark.parametrize("model", ["linear", "vp"])
@pytest.mark.parametrize("path", PATHS)
def test_endpoints_are_finite(model: str, path: str) -> None:
    """Every valid combination on every grid; then every number of steps from 1 to 50."""
    mine = [(name, g) for other, name, g in combinations() if other == path]
    cases = [(name, g, grid, steps) for name, g in mine for grid in FORMULA_GRIDS for steps in (1, 2, 10)]
    cases += [("euler-maruyama", None, grid, steps) for grid in FORMULA_GRIDS for steps in range(1, 51)]
    for name, g, grid, steps in cases:
        spec = ScheduleSpec(
            model_interpolant=model, interpolant=path, integrator=name, diffusion=g, grid=grid, steps=steps
        )
        schedule = build_schedule(spec)
        assert bool(torch.isfinite(schedule.table).all()), (name, g, grid, steps)
        assert bool(schedule.finished[-1]) and bool(schedule.searchable[0])
        assert bool((schedule.linear_time[1:] < schedule.linear_time[:-1]).all())
        assert float(schedule.linear_time[steps - 1 :].min()) > 0.0


def test_first_row_is_the_initial_noise() -> None:
    for model, path, expected in [
        ("linear", "linear", 1.0),
        (
            "linear",
            "vp",
            math.hypot(1 - 0.993472, 0.993472),
        ),  # starts at t = .9935, where unit-variance data has this scale
        ("vp", "linear", 1.0),
        ("vp", "vp", 1.0),
    ]:
        schedule = build_schedule(ScheduleSpec(model_interpolant=model, interpolant=path))
        row = dict(zip(COLUMNS, schedule.table[0].tolist(), strict=True))
        assert (row["A"], row["B"], row["G"], row["D_from"], row["E_from"]) == (0.0, 0.0, 0.0, 0.0, 0.0)
        assert row["C"] == pytest.approx(expected, abs=1e-6)
        assert float(schedule.time_from[0]) == float(schedule.time[0])
        assert bool(schedule.searchable[0])


def test_ten_step_ode() -> None:
    """Rows 0..9 at t = 1, .9, ..., .1: no tail, and x0_hat = x - t u at the end is the Euler step to 0."""
    schedule = build_schedule(ScheduleSpec(diffusion="zero"))
    assert schedule.time.tolist() == pytest.approx([1.0 - i / 10 for i in range(10)], abs=1e-15)
    assert schedule.table[1:, :3] == pytest.approx(torch.tensor([[1.0, -0.1, 0.0]] * 9, dtype=torch.float64), abs=1e-14)
    assert schedule.table[:, 4:6].tolist() == [[1.0, -t] for t in schedule.time.tolist()]
    assert schedule.searchable.tolist() == [True] + [False] * 9
    assert schedule.finished.tolist() == [False] * 9 + [True]
    assert schedule.transitions == 10
    assert all(column.dtype is torch.float64 for column in (schedule.table, schedule.time, schedule.linear_time))


def test_noise_that_float32_cannot_see_is_no_noise() -> None:
    schedule = build_schedule(ScheduleSpec(diffusion="exp:3:0.1"))
    assert schedule.searchable.tolist() == [True] * 5 + [False] * 5
    clipped = build_schedule(ScheduleSpec(diffusion="clipped:3"))
    assert clipped.searchable.tolist() == [True] * 6 + [False] * 4


@pytest.mark.parametrize("model", ["linear", "vp"])
def test_tail(model: str) -> None:
    """From the grid's end to exactly t_finish, without noise, in Euler steps of the linear path at most .12 wide."""
    grid = ScheduleSpec(model_interpolant=model, interpolant="vp", grid="paper")
    schedule = build_schedule(grid)
    last = float(schedule.linear_time[9])
    assert last == pytest.approx(0.709, abs=1e-3)
    assert schedule.transitions == 16
    assert not bool(schedule.searchable[10:].any()) and not bool(schedule.finished[:-1].any())
    assert float(schedule.linear_time[-1]) == pytest.approx(0.1, abs=1e-12) and bool(schedule.finished[-1])
    widths = -schedule.linear_time[9:].diff()
    assert float(widths.max() - widths.min()) < 1e-12 and float(widths.max()) <= 0.12
    # In linear-equivalent coordinates every step of the tail is x + (t' - t) u.
    x = torch.tensor([[0.3, -1.2]], dtype=torch.float64)
    path, linear, mixture = parse_interpolant(model), parse_interpolant("linear"), two_dimensions()
    for k in range(10, 16):
        t, t_next = float(schedule.linear_time[k - 1]), float(schedule.linear_time[k])
        scale, scale_next = (path.sigma_t(path.from_linear_time(s)) / s for s in (t, t_next))
        u = mixture.velocity(scale * x, float(schedule.time_from[k]), path)
        got = (schedule.table[k, 0] * scale * x + schedule.table[k, 1] * u) / scale_next
        assert torch.allclose(got, x + (t_next - t) * mixture.velocity(x, t, linear), rtol=1e-11)

    def transitions(**changes: object) -> int:
        return build_schedule(
            ScheduleSpec(model_interpolant=model, interpolant="vp", grid="paper", **changes)
        ).transitions

    assert transitions(tail=3) == 13
    assert transitions(tail=0) == 10
    assert transitions(t_finish=0.71) == 10
    assert transitions(t_finish=0.65) == 11


def test_a_grid_that_ends_at_t_finish_gets_no_tail() -> None:
    for steps in range(10, 40):
        for tail in (None, 4):
            assert build_schedule(ScheduleSpec(steps=steps, tail=tail)).transitions == steps
    assert build_schedule(ScheduleSpec(steps=9)).transitions == 10
    assert not bool(build_schedule(ScheduleSpec(steps=9, tail=0)).finished.any())
    assert build_schedule(ScheduleSpec(grid="times:1", t_finish=1.0)).transitions == 1


def test_tail_ends_where_a_fine_ode_ends() -> None:
    """The tail's last x0_hat against a 400-step ODE from the same point, data of unit variance: off by the Euler
    error of its width (.075 on average), which halves with it."""
    mixture, linear = two_modes(), parse_interpolant("linear")

    def end(tail: int | None, t_finish: float) -> Tensor:
        schedule = build_schedule(ScheduleSpec(interpolant="vp", grid="paper", tail=tail, t_finish=t_finish))
        x = torch.linspace(-1.5, 1.5, 31, dtype=torch.float64)[:, None]
        for k in range(10, schedule.transitions):
            u = mixture.velocity(x, float(schedule.time_from[k]), linear)
            x = schedule.table[k, 0] * x + schedule.table[k, 1] * u
        d, e = schedule.table[-1, 4:6].tolist()
        return d * x + e * mixture.velocity(x, float(schedule.time[-1]), linear)

    exact = end(400, 0.001)
    coarse, fine = (float((end(tail, t_finish) - exact).abs().mean()) for tail, t_finish in ((None, 0.1), (13, 0.05)))
    assert coarse < 0.08
    assert 0.4 * coarse < fine < 0.6 * coarse


def test_search_over_paths() -> None:
    """ODE to .7; blocks of one noisy step up by .1 and steps down by .25, and a selection where a block ends."""
    schedule, start, select = search_over_paths_schedule(ScheduleSpec(), t_start=0.7, forward=0.1, backward=0.25)
    expected = [1.0, 0.9, 0.8, 0.7]
    for end in (0.55, 0.4, 0.25, 0.1):
        top = end + 0.25
        expected += [top, top - 0.25 / 3, top - 0.5 / 3, end]
    assert schedule.linear_time.tolist() == pytest.approx(expected, abs=1e-12)
    assert (start, select) == (3, [7, 11, 15, 19])
    assert [k for k in range(schedule.transitions) if schedule.searchable[k]] == [0, 4, 8, 12, 16]
    assert schedule.finished.tolist() == [False] * 19 + [True]


@pytest.mark.parametrize("model", ["linear", "vp"])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("integrator", ["euler-maruyama", "exponential", "coefficient-preserving"])
def test_search_over_paths_on_every_path(model: str, path: str, integrator: str) -> None:
    """Steps up follow the model's forward process; steps down have no noise; the end is t_finish at any width."""
    spec = ScheduleSpec(model_interpolant=model, interpolant=path, integrator=integrator, t_finish=0.07)
    schedule, start, select = search_over_paths_schedule(spec, t_start=0.83, forward=0.11, backward=0.28, width=0.09)
    interpolant = parse_interpolant(model)
    assert float(schedule.linear_time[-1]) == pytest.approx(0.07, abs=1e-12)
    assert select[-1] == schedule.transitions - 1 and bool(schedule.finished[-1])
    ups = [k for k in range(1, schedule.transitions) if schedule.searchable[k]]
    assert ups == [start + 1] + [k + 1 for k in select[:-1]]
    for k in range(1, schedule.transitions):
        a, b, c = schedule.table[k, :3].tolist()
        t, t_next = float(schedule.time_from[k]), float(schedule.time[k])
        if k in ups:
            assert t_next > t and b == 0.0
            assert a * interpolant.alpha_t(t) == pytest.approx(interpolant.alpha_t(t_next), rel=1e-12)
            variance = (a * interpolant.sigma_t(t)) ** 2 + c**2
            assert variance == pytest.approx(interpolant.sigma_t(t_next) ** 2, rel=1e-12)
        else:
            assert t_next < t and c == 0.0
            assert float(schedule.linear_time[k - 1] - schedule.linear_time[k]) <= 0.09 + 1e-9


def test_search_over_paths_with_rounds_ends_in_a_tail() -> None:
    schedule, _, select = search_over_paths_schedule(ScheduleSpec(), t_start=0.7, forward=0.1, backward=0.3, rounds=1)
    assert len(select) == 1 and float(schedule.linear_time[select[0]]) == pytest.approx(0.5)
    assert schedule.transitions - 1 - select[0] == 4  # .4 in steps of at most .12
    assert bool(schedule.finished[-1])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"t_start": 1.0}, "t_finish < t_start < 1"),
        ({"t_start": 0.05}, "t_finish < t_start"),
        ({"forward": 0.3}, "0 < forward < backward"),
        ({"forward": 0.0}, "0 < forward < backward"),
        ({"t_start": 0.95}, "lower one"),
        ({"width": 0.0}, "width > 0"),
        ({"rounds": 0}, "at least 1"),
        ({"forward": 0.1, "backward": 0.1 + 1e-9}, "more than 10000 transitions"),
    ],
)
def test_search_over_paths_refusals(options: dict[str, float], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        search_over_paths_schedule(ScheduleSpec(), **{"t_start": 0.7, "forward": 0.1, "backward": 0.25, **options})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"t_finish": 0.0}, r"t_finish must lie in \[0.0001, 1\]"),
        ({"t_finish": math.nan}, "t_finish"),
        ({"tail": -1}, "tail must be None"),
        ({"model_interpolant": "vpp"}, "unknown interpolant"),
        ({"grid": "cosine"}, "unknown grid"),
        ({"diffusion": "square:1e200"}, "overflow float32"),
    ],
)
def test_refusals(options: dict[str, object], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_schedule(ScheduleSpec(**options))


NUMBER = st.floats(0.05, 3.0) | st.floats() | st.sampled_from([0.0, 1.0, 1e-300, 1e300])


def any_text(names: Iterable[str]) -> st.SearchStrategy[str]:
    return st.builds(
        lambda name, numbers: ":".join([name, *map(repr, numbers)]), st.sampled_from([*names, ""]), st.lists(NUMBER)
    )


def explicit(times: Iterable[float]) -> str:
    return "times:" + ",".join(map(repr, times))


VALID = st.fixed_dictionaries(
    {
        "model_interpolant": st.sampled_from([*INTERPOLANTS, "vp:0.3", "polynomial:1.7"]),
        "interpolant": st.sampled_from([*INTERPOLANTS, "vp:0.3", "polynomial:1.7"]),
        "diffusion": st.none() | st.sampled_from([*DIFFUSIONS, "exp:2:0.01"]),
        "integrator": st.sampled_from(["euler-maruyama", "exponential"]),
        "grid": st.sampled_from(["uniform", "paper", "linear", "shift", "ratio:2", "window:0.8:0.2:3"]),
        "steps": st.none() | st.integers(1, 60),
        "tail": st.none() | st.integers(0, 5),
        "t_finish": st.floats(1e-4, 1.0),
        "shift": st.floats(-3.0, 3.0),
        "strength": st.floats(-10.0, 10.0),
    }
)
ANYTHING = st.fixed_dictionaries(
    {
        "model_interpolant": any_text(INTERPOLANTS),
        "interpolant": any_text(INTERPOLANTS),
        "diffusion": any_text(DIFFUSIONS),
        "integrator": any_text(COMBINATIONS),
        "grid": any_text(GRIDS) | st.lists(NUMBER).map(explicit) | st.lists(st.floats(1e-4, 1.0)).map(explicit),
        "steps": st.integers(),
        "tail": st.integers(),
        "t_finish": NUMBER,
        "shift": st.none() | NUMBER,
        "strength": NUMBER,
    }
)


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    valid=VALID,
    anything=ANYTHING,
    spoiled=st.sets(st.sampled_from([field.name for field in fields(ScheduleSpec)]), max_size=2),
)
def test_any_options_give_a_schedule_or_one_clear_error(
    valid: dict[str, Any], anything: dict[str, Any], spoiled: set[str]
) -> None:
    """Valid options always give a schedule; with one or two replaced by nonsense there is one typed error at most."""
    try:
        schedule = build_schedule(ScheduleSpec(**{**valid, **{name: anything[name] for name in spoiled}}))
    except OptionError as error:
        assert spoiled and "\n" not in str(error)
        return
    assert bool(torch.isfinite(schedule.table.float()).all())
    assert bool((schedule.time > 0).all()) and bool((schedule.time <= 1).all())


def test_a_schedule_checks_its_own_shapes() -> None:
    good = build_schedule(ScheduleSpec(steps=3))
    fields = {
        name: getattr(good, name) for name in ("table", "time", "time_from", "linear_time", "searchable", "finished")
    }
    for name, value in [
        ("table", good.table[:, :7]),
        ("time", good.time[:2]),
        ("searchable", torch.zeros(9, dtype=torch.bool)),
    ]:
        with pytest.raises(OptionError, match=name):
            Schedule(**{**fields, name: value})
    with pytest.raises(OptionError, match="transition 0"):
        Schedule(**{**fields, "table": good.table + 1.0})
