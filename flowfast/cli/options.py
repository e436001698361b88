"""Options of commands: those of the configuration are made from its fields, those that several commands share stand
here."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flowfast.bounds import Within, ends
from flowfast.cli.config_file import parse_options
from flowfast.config import Config, EngineConfig, Rerun, SearchConfig, SearchParams

WITHOUT = {
    "model_options": "--model-option, once for each",
    "method_options": "--option, once for each",
    "gradient": "--guidance, where a command has it",
    "guidance_interval": "--guidance, where a command has it",
    **dict.fromkeys(Rerun.model_fields, "config.yaml, for a rerun: what happened to a search"),
}
"""Fields of the configuration that no option of their name gives, and what does."""
SEARCH, ENGINE = "Search", "Model, reward, and how they run"
PANELS: dict[str, type[Config]] = {SEARCH: SearchParams, ENGINE: EngineConfig}
"""Titles in --help, and whose fields stand under each."""
KINDS = (str, int, float, bool)
NONE: Mapping[str, Any] = MappingProxyType({})

Given = dict[str, Any]
"""Fields of the configuration that the user gave, by name."""
Out = Annotated[Path, typer.Option("--out", help="Folder for the results.")]
Lists = Annotated[
    list[str] | None,  # as a Path "" would be this folder
    typer.Option(
        "--prompts",
        help="A list of prompts, may come several times: .txt (one a line), .jsonl, .json, .csv, .tsv, a folder of "
        ".txt (one each), - for standard input.",
    ),
]
Column = Annotated[
    str | None,
    typer.Option(
        "--prompt-column", help="Where a list's prompts are; default: prompt, caption or text, else the only one."
    ),
]
ModelOption = Annotated[
    list[str] | None,
    typer.Option("--model-option", help="NAME=VALUE for a diffusers pipeline: height=512, ...", rich_help_panel=ENGINE),
]
Guidance = Annotated[
    str | None,
    typer.Option(
        help="Scale of classifier-free guidance (up to 1: off), with the linear t where it acts: 3@0.35:0.8; "
        "dps:STRENGTH; or both: 3,dps:0.5.",
        rich_help_panel=SEARCH,
    ),
]
MethodOption = Annotated[
    list[str] | None,
    typer.Option("--option", help="NAME=VALUE, an option of the method.", rich_help_panel=SEARCH),
]


def config_options(
    only: Collection[str] | None = None,
    without: Collection[str] = WITHOUT,
    help: Mapping[str, str] = NONE,
    defaults: Mapping[str, Any] = NONE,
    config: type[BaseModel] = SearchConfig,
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command an option for each field of the configuration.

    The command has a parameter `given`, a dictionary: in its place stand the options, in it what the user gave. A
    parameter of the command that has a field's name takes the place of that field's option.

    Args:
        only: these fields alone, among the command's own options; all others than `without` if not given.
        help: what options are in this command, by name; else the first paragraph under a field is its help.
        defaults: what this command takes where a field has no default, for the help.

    Raises:
        TypeError: a field's type is none of an option's.
    """
    names = [name for name in config.model_fields if name not in without and (only is None or name in only)]

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True).parameters
        made = {
            name: _option(name, config.model_fields[name], help.get(name), defaults.get(name), only is None)
            for name in names
            if name not in own
        }

        @functools.wraps(command)
        def wrapper(**given: Any) -> None:
            found = {name: given.pop(name) for name in made}
            command(given={name: value for name, value in found.items() if value is not None}, **given)

        parameters: list[inspect.Parameter] = []
        for name, parameter in own.items():
            if name == "given":
                parameters += [own.get(name) or made[name] for name in names]
            elif name not in names:
                parameters.append(parameter)
        wrapper.__signature__ = inspect.Signature(  # type: ignore[attr-defined]
            [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in parameters]
        )
        return wrapper

    return decorate


def _option(name: str, field: FieldInfo, help: str | None, default: Any, panels: bool) -> inspect.Parameter:
    """The parameter of a field's option: None where it is not given. panels: it stands under a title of PANELS."""
    text = " ".join((help or (field.description or "").split("\n\n")[0]).split())
    facts = [ends(bound) for bound in field.metadata if isinstance(bound, Within) and ends(bound)]
    default = field.default if default is None else default
    if default not in (None, ""):
        facts.append(f"default {('off', 'on')[default] if isinstance(default, bool) else default}")
    if facts:
        text = text if text.endswith("...") else text.removesuffix(".")
        text += f" ({'; '.join(facts)})."
    kind = _kind(name, field.annotation)
    title = next((title for title, owner in PANELS.items() if panels and name in owner.model_fields), None)
    annotation = Annotated[kind | None, typer.Option(help=text, rich_help_panel=title)]  # type: ignore[valid-type]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation)


def _kind(name: str, annotation: Any) -> type:
    """int of `int` and of `int | None`. Raises TypeError."""
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    found = [kind for kind in kinds if kind is not type(None)]
    if len(found) != 1 or found[0] not in KINDS:
        raise TypeError(
            f"field {name!r}: expected a text, a number, or yes or no, each or None, got {annotation}: name it in "
            "WITHOUT, and say how it is given"
        )
    return found[0]


def with_options(asked: Given, option: list[str] | None, model_option: list[str] | None) -> Given:
    """`asked` with what --option and --model-option give beside its own. Raises OptionError."""
    found = dict(asked)
    if option:
        found["method_options"] = {**asked.get("method_options", {}), **parse_options(option)}
    if model_option:
        found["model_options"] = {**asked.get("model_options", {}), **parse_options(model_option, "--model-option")}
    return found
