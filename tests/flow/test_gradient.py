"""`dps:STRENGTH` and what `--guidance` takes."""

import pytest

from flowfast.errors import OptionError
from flowfast.flow.gradient import DPS, parse_gradient, parse_guidance


def test_a_gradient_has_a_name_and_a_strength() -> None:
    assert parse_gradient("dps:0.5") == DPS(0.5)
    assert parse_gradient("dps") == DPS(1.0)
    assert parse_gradient("dps:-2") == DPS(-2.0)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fkc:1", "unknown gradient 'fkc'; choose one of: dps"),
        ("", "unknown gradient ''; choose one of: dps"),
        ("dps:much", "expected a finite number, got 'much'"),
        ("dps:nan", "expected a finite number, got 'nan'"),
        ("dps:inf", "expected a finite number, got 'inf'"),
        ("dps:1:2", "has 2 numbers; dps takes strength"),
    ],
)
def test_others_are_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse_gradient(text)


def test_guidance_names_a_scale_a_gradient_or_both() -> None:
    assert parse_guidance("3") == {"guidance": 3.0}
    assert parse_guidance("dps:0.5") == {"gradient": "dps:0.5"}
    assert parse_guidance("3, dps:0.5") == parse_guidance("dps:0.5,3") == {"guidance": 3.0, "gradient": "dps:0.5"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("3,4", "one scale and one gradient at most"),
        ("dps:1,dps:2", "one scale and one gradient at most"),
        ("3,", "one scale and one gradient at most"),
        ("", "expected a finite number, got ''"),
        ("nan", "expected a finite number, got 'nan'"),
        ("inf", "expected a finite number, got 'inf'"),
        ("3,cfg:2", "unknown gradient 'cfg'; choose one of: dps"),
    ],
)
def test_wrong_guidance_is_refused(text: str, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        parse_guidance(text)
