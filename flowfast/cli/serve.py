"""`flowfast serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flowfast.cli.config_file import read_config
from flowfast.cli.options import Given, ModelOption, config_options, with_options
from flowfast.config import make
from flowfast.errors import OptionError
from flowfast.serve.config import ServeConfig

OTHERWISE = {"model_options", "alias", "other_rewards", "quality", "devices", "size"}
"""Fields whose options stand below."""


@config_options(
    config=ServeConfig,
    without=OTHERWISE,
    help={"slots": "Pictures in one batch.", "reward": "See `flowfast rewards`; that of requests that name none."},
    defaults={"slots": 16, "max_budget": "the largest quality"},
)
def command(
    given: Given,
    model_option: ModelOption = None,
    quality: Annotated[
        str | None, typer.Option(help="Budgets by quality, in NFE: low=50,medium=200,high=500 (the default).")
    ] = None,
    alias: Annotated[
        list[str] | None, typer.Option(help="Another name that clients may call the model by; several times.")
    ] = None,
    other_reward: Annotated[
        list[str] | None, typer.Option(help="A reward that requests may choose beside the first one; several times.")
    ] = None,
    size: Annotated[
        str | None,
        typer.Option(help="Sizes of pictures: 512x512,1024x1024; the first is that of requests that name none."),
    ] = None,
    devices: Annotated[
        str | None, typer.Option(help="An engine in a process of its own on each: cuda:0,cuda:1.")
    ] = None,
    api_key: Annotated[
        str | None,
        typer.Option(help="Clients need it. Better in FLOWFAST_API_KEY, or a file that FLOWFAST_API_KEY_FILE names."),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="A server.yaml with these options; others override it.")] = None,
) -> None:
    """Serve OpenAI's images API: each picture is a search, which clients may watch and stop."""
    asked = {name: value for name, value in read_config(config).items() if name != "prompts"} if config else {}
    asked = with_options(asked | given, None, model_option)
    lists: dict[str, Any] = {"alias": alias, "other_rewards": other_reward, "devices": devices, "size": size}
    lists["quality"] = None if quality is None else budgets(quality)
    chosen = make(ServeConfig, asked | {name: value for name, value in lists.items() if value is not None})
    from flowfast.serve.run import serve

    serve(chosen, api_key)


def budgets(text: str) -> dict[str, Any]:
    """Of "low=50,high=500". Raises OptionError."""
    found: dict[str, Any] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        if not value.strip().isdecimal() or len(value) > 20 or name.strip() in found:
            raise OptionError(f"--quality: expected budgets as low=50,medium=200,high=500, got {text!r:.80}")
        found[name.strip()] = int(value)
    return found
