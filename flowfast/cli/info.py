"""`flowfast info`."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from flowfast import ops
from flowfast.cli.shown import print_names
from flowfast.version import versions


def command(
    file: Annotated[Path | None, typer.Argument(metavar="[ARCHIVE]", help="Of `flowfast export`.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """Versions, devices, the compiled libraries, and which backend runs each op, and why; or what an ARCHIVE is."""
    if file is not None:
        from flowfast.archive.load import read_info

        manifest = read_info(file)
        print(json.dumps(manifest, indent=2)) if as_json else print_names(manifest)
        return
    found = surroundings()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for section in ("versions", "devices", "libraries"):
        print_names(found[section])
    print_names({name: f"{live['backend']:<10} {live['reason']}" for name, live in found["ops"].items()})


def surroundings() -> dict[str, dict[str, Any]]:
    """What runs here: versions, devices, libraries, and for each op its backend and the reason."""
    return {
        "versions": {**versions(), "python": platform.python_version()},
        "devices": {
            "cpu": f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads",
            **{f"cuda:{i}": torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())},
        },
        "libraries": ops.libraries(),
        "ops": {name: {"backend": backend, "reason": reason} for name, (backend, reason) in ops.live().items()},
    }
