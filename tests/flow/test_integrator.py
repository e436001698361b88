"""One step: mean and variance (testing.md C1), the published formulas, orders of convergence (C3), refusals."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowfast.errors import OptionError
from flowfast.flow import (
    COMBINATIONS,
    DIFFUSIONS,
    Interpolant,
    Point,
    Schedule,
    ScheduleSpec,
    build_schedule,
    grid_times,
    parse_diffusion,
    parse_integrator,
    parse_interpolant,
)
from flowfast.flow.integrator import Exponential, renoise
from tests.flow import textbook
from tests.problems import standard_normal, two_modes

LINEAR, VP = parse_interpolant("linear"), parse_interpolant("vp")


def moments(seed: int, a: float, b: float, c: float) -> tuple[float, float]:
    z = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    x = a * 0.3 + b * 0.7 + c * z
    return float(x.mean()), float(x.var())


@pytest.mark.parametrize("path", [LINEAR, VP])
@pytest.mark.parametrize("name", ["euler-maruyama", "exponential", "coefficient-preserving"])
def test_mean_and_variance_of_a_step(path: Interpolant, name: str) -> None:
    """C1: at z = 0 the textbook's mean; at n = 1e6 the textbook's variance to 0.7 %, which 1 % more noise misses."""
    start, end = Point(LINEAR, path, 0.8), Point(LINEAR, path, 0.7)
    step = parse_integrator(name, interpolant="vp").step(start, end)
    sigma_next = path.sigma_t(0.7)
    if name == "euler-maruyama":
        std = 3.0 * 0.8**2 * math.sqrt(0.1)
    elif name == "exponential":
        std = sigma_next * math.sqrt(1.0 - math.exp(-2.0 * textbook.decay(path, parse_diffusion("square:3"), 0.8, 0.7)))
    else:
        std = sigma_next * math.sin(math.pi / 4.0)
    variance = (std / end.scale) ** 2
    assert moments(0, *step)[1] == pytest.approx(variance, rel=0.007)
    assert moments(0, step.a, step.b, step.c * 1.01)[1] != pytest.approx(variance, rel=0.007)
    if path is LINEAR and name == "euler-maruyama":  # A = 1 + dt g^2 / (2 t), B = dt (1 + (1 - t) g^2 / (2 t))
        g2 = 9.0 * 0.8**4
        assert step.a == pytest.approx(1.0 - 0.1 * g2 / 1.6, rel=4e-16)
        assert step.b == pytest.approx(-0.1 * (1.0 + 0.2 * g2 / 1.6), rel=4e-16)


@pytest.mark.parametrize("diffusion", [*DIFFUSIONS, "exp:3:0.02", "square:3"])
@pytest.mark.parametrize("path", ["linear", "vp", "polynomial:2"])
@pytest.mark.parametrize(("high", "low"), [(1.0, 0.9), (1.0, 0.02), (0.6, 0.45)])
def test_exponential_integrates_g(diffusion: str, path: str, high: float, low: float) -> None:
    """The decay is the integral of g^2 / (2 sigma^2), kinks included."""
    interpolant, g = parse_interpolant(path), parse_diffusion(diffusion)
    got = Exponential(g)._decay(Point(LINEAR, interpolant, high), Point(LINEAR, interpolant, low))
    assert got == pytest.approx(textbook.decay(interpolant, g, high, low, panels=4000), rel=1e-5, abs=1e-12)


def test_exponential_closed_form() -> None:
    """On the linear path g = 3 t^2 gives k = exp(-1.5 (t^3 - t'^3))."""
    got = Exponential(parse_diffusion("square:3"))._decay(Point(LINEAR, LINEAR, 1.0), Point(LINEAR, LINEAR, 0.01))
    assert got == pytest.approx(1.5 * (1.0 - 1e-6), rel=1e-13)


def test_zero_diffusion_is_the_ode_for_every_integrator() -> None:
    start, end = Point(LINEAR, LINEAR, 0.8), Point(LINEAR, LINEAR, 0.7)
    for name in COMBINATIONS:
        step = parse_integrator(name, interpolant="linear", diffusion="zero").step(start, end)
        assert step == pytest.approx((1.0, -0.1, 0.0), abs=1e-15)
        assert step.c == 0.0


def test_flow_grpo_clamps_sigma_at_the_second_time() -> None:
    """Published: at t = 1 the denominator 1 - t is taken at the second time of the grid."""
    schedule = build_schedule(ScheduleSpec(integrator="flow-grpo", steps=10))
    assert float(schedule.table[1, 2]) == pytest.approx(0.7 * math.sqrt(1.0 / 0.1) * math.sqrt(0.1), rel=1e-12)
    assert float(schedule.table[3, 2]) == pytest.approx(0.7 * math.sqrt(0.8 / 0.2) * math.sqrt(0.1), rel=1e-12)


def test_renoise_follows_the_forward_process() -> None:
    """Up in t the marginal is kept exactly: (alpha'/alpha)^2 var + added = alpha'^2 var(x0) + sigma'^2."""
    for path in (LINEAR, VP):
        low, high = Point(path, path, 0.4), Point(path, path, 0.6)
        step = renoise(low, high)
        for variance in (0.0, 0.3, 1.0):
            before = low.alpha_t**2 * variance + low.sigma_t**2
            assert step.a**2 * before + step.c**2 == pytest.approx(
                high.alpha_t**2 * variance + high.sigma_t**2, rel=1e-14
            )
        assert step.b == 0.0


@pytest.mark.parametrize(("path", "inflated", "flipped"), [(LINEAR, 1.155, 24.1), (VP, 1.069, 13.0)])
def test_published_inflation_of_the_variance(path: Interpolant, inflated: float, flipped: float) -> None:
    """Euler-Maruyama with g = 3 s^2 on the paper's grid inflates exact N(0, 1) data by up to 15.5 % (linear), 6.9 %
    (VP); the mutant that turns the score's sign around as well ends at 24 and 13 times the variance."""
    schedule = build_schedule(ScheduleSpec(interpolant="linear" if path is LINEAR else "vp", grid="paper", tail=0))
    normal, one = standard_normal(), torch.ones(1, 1, dtype=torch.float64)
    points = [textbook.Converted(normal, LINEAR, path, s) for s in grid_times("paper", 10, path=path, model=LINEAR)]
    table, mutant, ratios = float(schedule.table[0, 2]) ** 2, 1.0, []
    for k in range(1, schedule.transitions):
        a, b, c = schedule.table[k, :3].tolist()
        slope = a + b * float(normal.velocity(one, float(schedule.time_from[k]), LINEAR))
        table = slope**2 * table + c**2
        t = float(schedule.time[k])
        ratios.append(table / ((1.0 - t) ** 2 + t**2))
        start, end, g = points[k - 1], points[k], 3.0 * points[k - 1].s ** 2
        moved, noisy = (float(textbook.euler_maruyama(start, end, one, z, g, sign=-1.0)) for z in (0.0, 1.0))
        mutant = moved**2 * mutant + (noisy - moved) ** 2
    alpha, sigma, _, _ = points[-1].coefficients
    assert max(ratios) == pytest.approx(inflated, abs=6e-4)
    assert mutant / (alpha**2 + sigma**2) == pytest.approx(flipped, abs=0.1)


def law(schedule: Schedule, x: Tensor, density: Tensor | None = None) -> Tensor:
    """The density at the schedule's last evaluation on data `two_modes`, model linear: quadrature, no sampling."""
    mixture, dx = two_modes(), float(x[1] - x[0])
    if density is None:
        density = torch.exp(-((x / schedule.table[0, 2]) ** 2) / 2.0)
        density = density / (density.sum() * dx)
    for k in range(1, schedule.transitions):
        a, b, c = schedule.table[k, :3].tolist()
        mean = a * x + b * mixture.velocity(x[:, None], float(schedule.time_from[k]), LINEAR)[:, 0]
        density = textbook.propagate(density, mean, c, x)
    return density


def total_variation(steps: int, interpolant: str, integrator: str, diffusion: str | None, end: float) -> float:
    """Distance of the discretised law from the marginal at linear t = `end`: it bounds every weak error."""
    path = parse_interpolant(interpolant)
    times = torch.linspace(1.0, path.from_linear_time(end), steps + 1, dtype=torch.float64).tolist()
    grid = "times:" + ",".join(map(repr, times))
    spec = ScheduleSpec(interpolant=interpolant, integrator=integrator, diffusion=diffusion, grid=grid, tail=0)
    schedule = build_schedule(spec)
    x = torch.linspace(-6.0, 6.0, 801, dtype=torch.float64)
    exact = torch.exp(two_modes().marginal(1.0 - end, end).log_density(x[:, None]))
    return float((law(schedule, x) - exact).abs().sum() * (x[1] - x[0])) / 2.0


@pytest.mark.parametrize(
    ("interpolant", "integrator", "diffusion", "end"),
    [
        ("linear", "euler-maruyama", "constant:1", 0.3),
        ("linear", "euler-maruyama", "square:3", 0.35),
        ("vp", "euler-maruyama", "constant:2", 0.5),
        ("vp", "euler-maruyama", "square:3", 0.5),
        ("trigonometric", "euler-maruyama", "sigma:1.5", 0.4),
        ("linear", "exponential", "constant:1", 0.3),
        ("linear", "exponential", "square:3", 0.35),
        ("vp", "exponential", "constant:2", 0.5),
        ("vp", "exponential", "square:3", 0.5),
    ],
)
def test_weak_order_is_one(interpolant: str, integrator: str, diffusion: str, end: float) -> None:
    """C3. At 64 steps the distances are .004 to .009."""
    coarse, fine = (total_variation(steps, interpolant, integrator, diffusion, end) for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.1)


def test_weak_order_of_coefficient_preserving() -> None:
    """With eta fixed the noise of a step does not shrink with the step: there is no limit, the law stays biased. With
    eta ~ sqrt(step), which is a diffusion, the order is one."""

    def distance(steps: int, eta: float) -> float:
        return total_variation(steps, "linear", f"coefficient-preserving:{eta!r}", None, 0.3)

    coarse, fine = (distance(steps, 0.5 * math.sqrt(8 / steps)) for steps in (32, 64))
    assert math.log2(coarse / fine) == pytest.approx(1.0, abs=0.1)
    assert distance(64, 0.5) > 3.0 * fine


def test_weak_order_of_flow_grpo() -> None:
    """Away from t = 1 the order is one. From t = 1 the clamp leaves g^2 dt constant in the first steps, whose error
    dies out only like step^(a^2): the order falls below one as the grid is refined."""
    x = torch.linspace(-6.0, 6.0, 801, dtype=torch.float64)
    dx, mixture = float(x[1] - x[0]), two_modes()
    density = torch.exp(mixture.marginal(0.1, 0.9).log_density(x[:, None]))
    exact = torch.exp(mixture.marginal(0.7, 0.3).log_density(x[:, None]))
    distances = []
    for steps in (32, 64):
        integrator = parse_integrator("flow-grpo", interpolant="linear", ceiling=0.95)
        times = torch.linspace(0.9, 0.3, steps + 1, dtype=torch.float64).tolist()
        law_t = density
        for t, t_next in zip(times[:-1], times[1:], strict=True):
            a, b, c = integrator.step(Point(LINEAR, LINEAR, t), Point(LINEAR, LINEAR, t_next))
            mean = a * x + b * mixture.velocity(x[:, None], t, LINEAR)[:, 0]
            law_t = textbook.propagate(law_t, mean, c, x)
        distances.append(float((law_t - exact).abs().sum() * dx) / 2.0)
    assert math.log2(distances[0] / distances[1]) == pytest.approx(1.0, abs=0.1)
    coarse, fine = (total_variation(steps, "linear", "flow-grpo", None, 0.3) for steps in (32, 64))
    assert math.log2(coarse / fine) < 0.9
    assert fine < 0.01


def transport(x: Tensor, source: Callable[[Tensor], Tensor], target: Callable[[Tensor], Tensor]) -> Tensor:
    """The exact ODE in one dimension keeps quantiles: solve target(y) = source(x) by bisection."""
    low, high = torch.full_like(x, -20.0), torch.full_like(x, 20.0)
    level = source(x)
    for _ in range(80):
        middle = (low + high) / 2.0
        below = target(middle) < level
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2.0


@pytest.mark.parametrize("interpolant", ["linear", "vp", "trigonometric", "polynomial:2"])
@pytest.mark.parametrize("integrator", ["euler-maruyama", "exponential"])
def test_order_of_the_ode_is_one(interpolant: str, integrator: str) -> None:
    """C3: Euler on every path (and DDIM, which is Euler on the linear path) against quantile transport."""
    mixture, path = two_modes(), parse_interpolant(interpolant)
    errors = []
    for steps in (64, 128):
        times = torch.linspace(1.0, path.from_linear_time(0.2), steps + 1, dtype=torch.float64).tolist()
        grid = "times:" + ",".join(map(repr, times))
        spec = ScheduleSpec(interpolant=interpolant, integrator=integrator, diffusion="zero", grid=grid, tail=0)
        schedule = build_schedule(spec)
        first = float(schedule.time[0])
        x = start = torch.linspace(-2.0, 2.0, 41, dtype=torch.float64)
        for k in range(1, schedule.transitions):
            a, b, c = schedule.table[k, :3].tolist()
            assert c == 0.0
            x = a * x + b * mixture.velocity(x[:, None], float(schedule.time_from[k]), LINEAR)[:, 0]
        exact = transport(start, mixture.marginal(1.0 - first, first).cdf, mixture.marginal(0.8, 0.2).cdf)
        errors.append(float((x - exact).abs().mean()))
    assert math.log2(errors[0] / errors[1]) == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize(
    ("integrator", "interpolant", "diffusion", "words"),
    [
        ("heun", "linear", None, "choose one of: euler-maruyama, exponential, coefficient-preserving, flow-grpo"),
        ("flow-grpo", "vp", None, "flow-grpo works with interpolant linear only, got 'vp'"),
        ("flow-grpo", "vp:0.1:20", "zero", "flow-grpo works with interpolant linear only"),
        ("flow-grpo", "linear", "square:3", "sets its noise by a and takes no diffusion"),
        ("flow-grpo:-1", "linear", None, "a >= 0"),
        ("coefficient-preserving", "vp", "square:3", "sets its noise by eta and takes no diffusion, got 'square:3'"),
        ("coefficient-preserving", "vp", "cubic", "unknown diffusion"),
        ("coefficient-preserving:2", "vp", None, r"eta in \[0, 1\]"),
        ("coefficient-preserving:x", "vp", None, "finite number"),
        ("coefficient-preserving:0.1:0.2", "vp", None, "takes eta"),
        ("euler-maruyama:1", "linear", None, "takes none"),
    ],
)
def test_refusals(integrator: str, interpolant: str, diffusion: str | None, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        build_schedule(ScheduleSpec(integrator=integrator, interpolant=interpolant, diffusion=diffusion))
