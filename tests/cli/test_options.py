"""Options made from the fields of the configuration: each field has one, or a line of WITHOUT says what gives it."""

from __future__ import annotations

import re
from typing import Annotated, Any

import pytest
import typer
from pydantic import create_model
from typer.testing import CliRunner

from flowfast import cli
from flowfast.bounds import Within
from flowfast.cli.export import OF_A_REQUEST, OF_PYTHON
from flowfast.cli.on_ray import CLUSTER
from flowfast.cli.options import ENGINE, SEARCH, WITHOUT, Given, config_options
from flowfast.config import EngineConfig, Rerun, SearchConfig, SearchParams
from tests.cli.conftest import Run


class Grown(SearchConfig):
    """The configuration with fields that nobody named on the command line."""

    warmth: Annotated[float | None, Within(0, 5)] = None
    """How warm it is.

    This is for readers of the source."""
    rounds: Annotated[int, Within(1, 9)] = 3
    """How often."""
    mirrored: bool = True
    """Left is right."""
    mood: str = "calm"
    """Its mood: calm, ..."""


def called(config: Any, *argv: str, **how: Any) -> tuple[Any, str]:
    """What a command with these options gets, and what it prints."""
    app, got = typer.Typer(add_completion=False), []

    @app.command()
    @config_options(config=config, **how)
    def command(given: Given, other: Annotated[int, typer.Option(help="Its own.")] = 4) -> None:
        got.append((given, other))

    result = CliRunner().invoke(app, list(argv), env={"COLUMNS": "200"})
    return (got[0] if got else None), result.output


def names_in(text: str) -> set[str]:
    return {name.replace("-", "_") for name in re.findall(r"^. --([a-z-]+)", text, re.MULTILINE)}


def test_every_field_has_its_option_or_a_line_that_says_what_gives_it(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    fields = set(SearchConfig.model_fields)
    assert WITHOUT.keys() == {"model_options", "method_options", "gradient", "guidance_interval", *Rerun.model_fields}
    assert fields - names_in(run("generate", "--help")) == WITHOUT.keys()
    assert fields - names_in(run("export", "--help")) == WITHOUT.keys() | OF_A_REQUEST | OF_PYTHON
    for name in fields - WITHOUT.keys():
        assert SearchConfig.model_fields[name].description, f"{name}: no help under the field"


def test_a_field_that_is_added_appears_by_itself() -> None:
    new = set(Grown.model_fields) - set(SearchConfig.model_fields)
    found, text = called(Grown, "--help")
    assert (
        names_in(text) - names_in(called(SearchConfig, "--help")[1]) == new == {"warmth", "rounds", "mirrored", "mood"}
    )
    for line in (
        r"--warmth +<float> +How warm it is \(0 \.\. 5\)\.",
        r"--rounds +<int> +How often \(1 \.\. 9; default 3\)\.",
        r"--mirrored +--no-mirrored +<bool> +Left is right \(default on\)\.",
        r"--mood +<str> +Its mood: calm, \.\.\. \(default calm\)\.",
    ):
        assert re.search(line, text), text
    argv = ("--warmth", "1.5", "--no-mirrored", "--rounds", "7", "--top-k", "2", "--other", "5")
    found, _ = called(Grown, *argv)
    assert found == ({"warmth": 1.5, "mirrored": False, "rounds": 7, "top_k": 2}, 5)
    assert called(Grown) == (({}, 4), "")  # what was not given is left to config.yaml and to the defaults


def test_a_field_that_is_no_option_must_be_named() -> None:
    grown = create_model("Grown", __base__=SearchConfig, sizes=(tuple[int, ...], ()))
    with pytest.raises(TypeError, match="field 'sizes': expected a text, a number.*name it in WITHOUT"):
        called(grown)
    assert called(grown, without={*WITHOUT, "sizes"}) == (({}, 4), "")


def test_a_command_says_what_differs_there() -> None:
    how = {"only": ("budget", "reward"), "help": {"reward": "Its own help."}, "defaults": {"budget": 77}}
    _, text = called(SearchConfig, "--help", **how)
    assert names_in(text) == {"budget", "reward", "other", "help"}
    assert "Its own help (default scenes)." in text and "default 77)." in text
    assert called(SearchConfig, "--budget", "9", **how)[0] == ({"budget": 9}, 4)


def test_a_parameter_of_a_command_stands_in_place_of_a_field(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """--guidance of generate takes a gradient too, and stands where the field does."""
    monkeypatch.setenv("COLUMNS", "200")
    text = run("generate", "--help")
    assert "dps:STRENGTH" in text
    assert text.index("--tail") < text.index("--guidance") < text.index("--negative-prompt")


def test_help_has_the_options_of_a_search_and_of_its_engine_apart(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    own, searched, engine, cluster = re.split(rf"─ (?:{SEARCH}|{ENGINE}|{CLUSTER}) ─", run("generate", "--help"))
    assert names_in(searched) == SearchParams.model_fields.keys() - WITHOUT.keys() | {"option"}
    assert names_in(engine) == EngineConfig.model_fields.keys() - WITHOUT.keys() | {"model_option"}
    assert names_in(cluster) == {"ray", "actors", "gpus"}
    assert {"prompts", "out", "resume"} <= names_in(own)


def test_every_command_says_what_it_does(run: Run) -> None:
    for name in cli.COMMANDS:
        assert "Usage: flowfast " + name in run(name, "--help")
