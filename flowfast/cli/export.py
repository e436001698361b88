"""`flowfast export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flowfast import api
from flowfast.cli.config_file import read_config
from flowfast.cli.options import WITHOUT, Column, Given, Lists, MethodOption, ModelOption, config_options, with_options
from flowfast.cli.shown import print_names
from flowfast.config import make_config
from flowfast.prompts import check_no_lists, check_prompts, read_lists

OF_A_REQUEST = {"seed", "repeat", "first_chain", "pool", "pool_wave", "until", "seconds"}
OF_PYTHON = {"finalists", "cuda_graphs", "compile", "overlap", "reward_deadline"}
"""Fields of the configuration that an archive does not know."""


@config_options(
    without={*WITHOUT, *OF_A_REQUEST, *OF_PYTHON},
    help={
        "reward": "See `flowfast rewards`; host: the server scores.",
        "budget": "The largest NFE of a request.",
        "slots": "Requests that run at once.",
    },
    defaults={"budget": 500, "slots": 4},
)
def command(
    given: Given,
    model_option: ModelOption = None,
    option: MethodOption = None,
    prompt: Annotated[
        list[str] | None, typer.Option("--prompt", help="Known to the archive, where encoding does not script.")
    ] = None,
    lists: Lists = None,
    column: Column = None,
    config: Annotated[Path | None, typer.Option(help="A config.yaml of a search: its other settings.")] = None,
    form: Annotated[
        str, typer.Option("--format", help="torchscript, or aoti: compiled parts beside it.")
    ] = "torchscript",
    out: Annotated[Path, typer.Option("--out", help="The file.")] = Path("archive.pt"),
) -> None:
    """Write model, reward and search into one file for C++ servers; `flowfast info FILE` says what it is."""
    from flowfast.archive.export import export
    from flowfast.archive.load import read_info

    asked = {**(read_config(config) if config else {}), **given, "seconds": None}
    for name in ("prompts", "layout"):
        asked.pop(name, None)
    asked = with_options(asked, option, model_option)
    check_no_lists(prompt or [])
    texts = [*(prompt or []), *read_lists(lists or [], column)]
    if texts:
        check_prompts(texts)
    resolved = make_config(asked)
    flow = api.load(resolved.model, **resolved.model_options)
    export(flow, out, prompts=texts, format=form, config=resolved)
    print_names(read_info(out))
