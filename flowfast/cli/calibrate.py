"""`flowfast calibrate`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from flowfast import api
from flowfast.bounds import MOST_ROWS
from flowfast.cli.compare import built_in_prompts
from flowfast.cli.config_file import parse_options
from flowfast.cli.options import Column, Given, Guidance, Lists, ModelOption, config_options, with_options
from flowfast.cli.shown import progress
from flowfast.config import make
from flowfast.errors import OptionError
from flowfast.flow.gradient import parse_guidance
from flowfast.models.answers import defaults_of
from flowfast.prompts import read_lists
from flowfast.types import WALK_OPTIONS


@config_options(
    only=("model", "reward", *WALK_OPTIONS, "seed", "micro_batch"),
    help={"micro_batch": "Rows in one model call; by default those of a prompt, at most 32."},
)
def command(
    given: Given,
    guidance: Guidance = None,
    model_option: ModelOption = None,
    lists: Lists = None,
    column: Column = None,
    limit: Annotated[int, typer.Option(min=1, help="Only the first N prompts.")] = 24,
    chains: Annotated[int, typer.Option(min=2, max=MOST_ROWS, help="Trajectories of each prompt.")] = 24,
    path: Annotated[
        list[str] | None,
        typer.Option(
            "--path",
            help="Options of another path to look at, with spaces between them, may come several times: "
            "'steps=6 guidance=2'. Default: those that the model knows.",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=1024, help="Processes that share the machine's threads.")] = 1,
    out: Annotated[Path, typer.Option("--out", help="The file; its picture stands beside it.")] = Path(
        "calibration.json"
    ),
) -> None:
    """Measure what a reward knows of a sample on its way; run again with the same --out to go on after a stop.

    Without --prompts those of `scenes` are the first hard prompts of the tuning half."""
    from flowfast.calibrate import Calibration, curve, run
    from flowfast.report.calibration import calibration_picture, calibration_rows
    from flowfast.report.tables import markdown
    from flowfast.report.write import check_places, drawn, write_bytes

    picture = out.with_suffix(".png")
    if picture == out:
        raise OptionError(f"expected --out to be the name of a JSON file, got {out}, where its picture will be")
    check_places([out.parent], [out.name, picture.name])
    if guidance is not None:
        given |= parse_guidance(guidance)
    if "gradient" in given:
        raise OptionError(f"a calibration follows no gradient, got --guidance {guidance}: leave dps out")
    own = {name: given.pop(name) for name in WALK_OPTIONS if name in given}
    asked = with_options(given, None, model_option)
    model = asked.setdefault("model", "scenes")
    texts = read_lists(lists, column, seeds=False) if lists else built_in_prompts(model, "tuning")
    flow = api.load(model, **asked.get("model_options", {}))
    others = [parse_options(text.split(), "--path") for text in path or []] or defaults_of(flow).ode_paths
    calibration = make(
        Calibration,
        {
            "prompts": tuple(dict.fromkeys(texts))[:limit],
            "paths": (own, *(over(own, other) for other in others)),
            "chains": chains,
            **asked,
        },
    )
    with progress() as advance:
        bank = run(calibration, flow, out, advance, workers)
    found = curve(calibration, flow, bank)
    print(markdown(*calibration_rows(bank, found)))
    drawn(picture, lambda: write_bytes(picture, calibration_picture(bank, found)), "the same command")
    print(f"{out}  {picture}")


def over(own: Given, other: Mapping[str, Any]) -> Given:
    """`own` with the options of another path in their place; guidance is one thing with the times where it acts."""
    kept = {name: value for name, value in own.items() if name != "guidance_interval" or "guidance" not in other}
    return kept | dict(other)
