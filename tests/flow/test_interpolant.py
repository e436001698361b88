"""Interpolants against their formulas, and a path seen from another model's path (testing.md C4)."""

import math

import pytest
import torch

from flowfast.errors import OptionError
from flowfast.flow import Point, parse_interpolant
from tests.flow.textbook import Converted
from tests.problems import quadratic_reward, two_dimensions, two_modes

ALL = ["linear", "vp", "vp:0.1:12", "vp:3:3", "trigonometric", "linear-vp", "polynomial:2", "polynomial:0.7"]
TIMES = [0.001, 0.05, 0.3, 0.5, 0.77, 0.95, 1.0]


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("t", TIMES)
def test_inverses_and_derivatives(name: str, t: float) -> None:
    path = parse_interpolant(name)
    assert path.rho_inverse(path.rho(t)) == pytest.approx(t, rel=1e-11)
    assert path.from_linear_time(path.linear_time(t)) == pytest.approx(t, rel=1e-11)
    assert path.linear_time(t) == pytest.approx(1.0 / (1.0 + path.rho(t)), rel=1e-14)
    if t < 1.0:
        h = 1e-4 * t
        assert (path.alpha_t(t + h) - path.alpha_t(t - h)) / (2 * h) == pytest.approx(
            path.d_alpha_t(t), rel=1e-6, abs=1e-7
        )
        assert (path.sigma_t(t + h) - path.sigma_t(t - h)) / (2 * h) == pytest.approx(
            path.d_sigma_t(t), rel=1e-6, abs=1e-7
        )


@pytest.mark.parametrize("name", ["vp", "trigonometric", "linear-vp"])
def test_variance_preserving_paths(name: str) -> None:
    path = parse_interpolant(name)
    for t in TIMES:
        assert path.alpha_t(t) ** 2 + path.sigma_t(t) ** 2 == pytest.approx(1.0, abs=1e-15)


def test_ends() -> None:
    for name in ALL:
        path = parse_interpolant(name)
        if not name.startswith("vp"):
            assert (path.alpha_t(1.0), path.sigma_t(1.0)) == (0.0, 1.0)
        assert path.rho_inverse(0.0) == 1.0
        assert path.from_linear_time(1.0) == 1.0
    vp = parse_interpolant("vp")
    assert vp.alpha_t(1.0) == pytest.approx(math.exp(-5.025), rel=1e-15)
    assert vp.linear_time(1.0) == pytest.approx(0.99347, abs=1e-5)


# Away from both ends, in the path's own time and in linear-equivalent time.
CONVERSION_TIMES = [("own", t) for t in (0.05, 0.2, 0.4, 0.6, 0.8, 0.95)] + [("linear", t) for t in (0.05, 0.5, 0.95)]


def _reached(model_name: str, path_name: str, kind: str, time: float) -> bool:
    """Whether the model knows the path's ratio alpha / sigma at this time."""
    model, path = parse_interpolant(model_name), parse_interpolant(path_name)
    return path.rho(time if kind == "own" else path.from_linear_time(time)) >= model.rho(1.0)


@pytest.mark.parametrize(
    ("model_name", "path_name", "kind", "time"),
    [(a, b, *t) for a in ALL for b in ALL for t in CONVERSION_TIMES if _reached(a, b, *t)],
)
def test_conversion_float64(model_name: str, path_name: str, kind: str, time: float) -> None:
    """C4, every pair of paths: velocity, score and x0_hat of the path from the model's x and u, against closed form,
    and the same by the published formula with c' and t'."""
    mixture, model, path = two_dimensions(), parse_interpolant(model_name), parse_interpolant(path_name)
    s = time if kind == "own" else path.from_linear_time(time)
    point, textbook = Point(model, path, s), Converted(mixture, model, path, s)
    noise = torch.randn(200, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x0 = mixture.sample(200, torch.Generator().manual_seed(1))
    x_bar = path.alpha_t(s) * x0 + path.sigma_t(s) * noise
    x = x_bar / point.scale
    u = mixture.velocity(x, point.t, model)
    for pair, published, exact in [
        (point.velocity, textbook.velocity(x_bar), mixture.velocity(x_bar, s, path)),
        (point.score, textbook.score(x_bar), mixture.score(x_bar, s, path)),
        (point.x0_hat, textbook.x0_hat(x_bar), mixture.x0_hat(x_bar, s, path)),
    ]:
        scale = float(exact.abs().max())
        assert float((pair[0] * x + pair[1] * u - exact).abs().max()) < 1e-11 * max(1.0, scale)
        assert float((published - exact).abs().max()) < 1e-10 * max(1.0, scale)


@pytest.mark.parametrize(("kind", "time"), CONVERSION_TIMES)
def test_conversion_float32(kind: str, time: float) -> None:
    """C4: linear -> VP with float32 states and coefficients; relative to the largest value where that exceeds 1."""
    mixture, model, path = two_dimensions(), parse_interpolant("linear"), parse_interpolant("vp")
    s = time if kind == "own" else path.from_linear_time(time)
    point = Point(model, path, s)
    x0 = mixture.sample(2000, torch.Generator().manual_seed(1))
    noise = torch.randn(2000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x = (point.alpha_t * x0 + point.sigma_t * noise).float()
    u = mixture.velocity(x.double(), point.t, model).float()
    x_bar = point.scale * x.double()
    for pair, exact in [
        (point.velocity, mixture.velocity(x_bar, s, path)),
        (point.score, mixture.score(x_bar, s, path)),
        (point.x0_hat, mixture.x0_hat(x_bar, s, path)),
    ]:
        on_x, on_u = torch.tensor(pair, dtype=torch.float32)
        error = float((on_x * x + on_u * u - exact).abs().max())
        assert error < 1e-5 * max(1.0, float(exact.abs().max()))


def test_score_is_the_gradient_of_the_log_density() -> None:
    mixture, path, s = two_dimensions(), parse_interpolant("vp"), 0.4
    x = torch.randn(50, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    marginal = mixture.marginal(path.alpha_t(s), path.sigma_t(s))
    (gradient,) = torch.autograd.grad(marginal.log_density(x).sum(), x)
    assert torch.allclose(gradient, mixture.score(x.detach(), s, path), rtol=1e-12, atol=1e-12)


def test_a_time_per_row_gives_the_same_as_one_time() -> None:
    mixture, path = two_modes(), parse_interpolant("vp")
    x = torch.linspace(-2, 2, 3, dtype=torch.float64)[:, None]
    rows = mixture.velocity(x, torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64), path)
    single = [mixture.velocity(x[i : i + 1], t, path) for i, t in enumerate((0.2, 0.5, 0.9))]
    assert torch.allclose(rows, torch.cat(single), rtol=1e-14)


def test_quadratic_tilt_is_a_mixture_with_the_stated_constant() -> None:
    mixture, target, width = two_modes(), torch.tensor([1.0], dtype=torch.float64), 0.7
    tilted, log_normalizer = mixture.tilt(target, width)
    x = torch.linspace(-8, 8, 4001, dtype=torch.float64)[:, None]
    log_joint = mixture.log_density(x) + quadratic_reward(x, target, width)
    total = float(torch.trapezoid(torch.exp(log_joint), x[:, 0]))
    assert math.log(total) == pytest.approx(log_normalizer, abs=1e-10)
    assert torch.allclose(log_joint - log_normalizer, tilted.log_density(x), atol=1e-10)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("vpp", "choose one of: linear, vp, trigonometric, linear-vp, polynomial"),
        ("vp:x", "finite number"),
        ("vp:nan", "finite number"),
        ("vp:0.1:20:3", "takes b0, b1"),
        ("linear:1", "takes no numbers"),
        ("vp:-1", "b0 and b1 in"),
        ("polynomial:0", r"n in \[0.1, 100\]"),
        ("", "unknown interpolant"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_interpolant(text)
