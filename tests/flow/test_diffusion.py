"""Diffusion coefficients against their formulas."""

import math

import pytest

from flowfast.errors import OptionError
from flowfast.flow import DIFFUSIONS, parse_diffusion, parse_interpolant

VP = parse_interpolant("vp")


@pytest.mark.parametrize(
    ("text", "s", "expected"),
    [
        ("zero", 0.7, 0.0),
        ("constant:2", 0.7, 2.0),
        ("sigma:2", 0.7, 2.0 * VP.sigma_t(0.7)),
        ("linear:2", 0.7, 1.4),
        ("square:3", 0.7, 1.47),
        ("square", 0.7, 0.49),
        ("sin:2", 0.7, 2.0 * math.sin(0.35 * math.pi)),
        ("exp:2", 0.9, 2.0 * math.exp(-1.0)),
        ("exp:2:0.2", 0.9, 2.0 * math.exp(-0.25)),
        ("tan:2", 0.7, 2.0 * math.tan(0.35 * math.pi)),
        ("tan", 1.0, math.tan(0.475 * math.pi)),
        ("clipped:3", 0.7, 1.2),
        ("clipped:3", 0.5, 0.0),
        ("clipped:3", 0.2, 0.0),
    ],
)
def test_formula(text: str, s: float, expected: float) -> None:
    assert parse_diffusion(text).g_t(s, VP) == pytest.approx(expected, rel=1e-14)


def test_kinks_lie_where_the_formula_bends() -> None:
    for name, kink in (("tan", 0.95), ("clipped", 0.5)):
        diffusion, h = parse_diffusion(name), 1e-4
        assert kink in diffusion.kinks
        left, middle, right = (diffusion.g_t(kink + d, VP) for d in (-h, 0.0, h))
        assert abs((right - middle) - (middle - left)) > 1e-5
    assert all(not cls().kinks for name, cls in DIFFUSIONS.items() if name not in ("tan", "clipped", "exp"))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cubic", "choose one of: zero, constant, sigma, linear, square, sin, exp, tan, clipped"),
        ("square:-1", ">= 0"),
        ("square:3:4", "takes norm"),
        ("zero:1", "takes no numbers"),
        ("exp:1:0", "width"),
        ("constant:inf", "finite number"),
    ],
)
def test_refusals(text: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        parse_diffusion(text)
