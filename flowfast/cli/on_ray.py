"""`flowfast generate --ray`."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flowfast.cli.shown import print_rows, progress
from flowfast.config import SearchConfig, make
from flowfast.errors import OptionError
from flowfast.prompts import few_of, show

CLUSTER = "Many machines"
Address = Annotated[
    str | None,
    typer.Option("--ray", help="Search on a cluster: local, auto, HOST:PORT (docs/ray.md).", rich_help_panel=CLUSTER),
]
Actors = Annotated[
    int | None, typer.Option(help="With --ray: processes with the model; default 1.", rich_help_panel=CLUSTER)
]
Gpus = Annotated[
    float | None,
    typer.Option(help="With --ray: GPUs of an actor, or a fraction; default 1, or 0.", rich_help_panel=CLUSTER),
]

if TYPE_CHECKING:
    from flowfast.ray.generate import RayConfig
    from flowfast.report.gathered import Shown


def cluster_of(ray: str | None, actors: int | None, gpus: float | None, profile: Path | None) -> Any:
    """Where a call with --ray runs; None: here. Raises OptionError."""
    if ray is None:
        if actors is not None or gpus is not None:
            raise OptionError("--actors and --gpus are for --ray: say --ray local, auto or HOST:PORT too")
        return None
    if profile is not None:
        raise OptionError("--profile traces one process: leave out --ray")
    from flowfast.ray.generate import RayConfig

    return make(RayConfig, {"address": ray, "actors": 1 if actors is None else actors, "gpus": gpus})


def draw_on(where: Any, out: Path, texts: list[str], config: SearchConfig, *rest: Any) -> None:
    """A call with --ray. rest: was it resumed, the layout, why some prompts cannot be drawn."""
    resumed, layout, refused = rest
    started = time.perf_counter()
    shown, folders, failed = gathered(out, texts, config, where, resumed, layout)
    print_rows([(each.reward, each.heldout, each.nfe) for each in shown], folders)
    print(f"{time.perf_counter() - started:.2f} s on {where.actors} actors")
    if refused or failed:
        raise typer.Exit(2)


def gathered(
    out: Path, texts: list[str], config: SearchConfig, where: RayConfig, resumed: bool, layout: str
) -> tuple[list[Shown], list[Path], list[str]]:
    """Draws what is not done yet: what each prompt got, its folder, and why some got nothing."""
    from flowfast.ray.generate import check, found_by
    from flowfast.report.gathered import GatheredFiles

    check(config)
    files = GatheredFiles(out, texts, config, resumed=resumed, layout=layout)
    started, failed = time.perf_counter(), list[str]()
    files.start()
    with progress() as advance:
        for row in found_by(files.waiting, config, where) if files.waiting else ():
            if row["error"] is None:
                files.on_row(row)
            else:
                failed.append(f"{show(files.prompts[row['number']])}: {row['error']}")
            advance(len(files.done), len(files.prompts), f"prompts on {where.actors} actors")
    shown = files.gathered(time.perf_counter() - started)
    if failed:
        again = f"flowfast generate --resume {out} --ray {where.address}"
        print(f"flowfast: {few_of(failed)}; the others are drawn, once more: {again}", file=sys.stderr)
    return shown, [files.folders[index] for index in sorted(files.done)], failed
