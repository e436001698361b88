"""`flowfast generate --layout geneval`: the folders that GenEval's evaluate_images.py reads
(github.com/djghosh13/geneval).

00000/metadata.jsonl        tag, include, exclude and prompt of the first prompt
00000/samples/00000.png     its samples: the best of the search, then those of --top-k; --repeat 1 goes on behind them

The other files of generate lie beside them; where several repeats go into one folder, those of the last one. The
evaluator counts whatever pictures it finds. So samples of an earlier call stay only where it was another repeat of this
one, which samples.json tells, and folders of other prompts are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowfast.config import SearchConfig
from flowfast.errors import OutputError, PromptError
from flowfast.prompts import field_of, show
from flowfast.report.write import write_json

ANY = {"repeat", "micro_batch", "splits", "slots", "cuts", "cuda_graphs", "compile", "overlap", "reward_deadline"}
"""Options in which calls may differ whose samples lie side by side."""


def metadata(prompt: str) -> dict[str, Any]:
    """What GenEval says of a prompt. Where a list has classes and counts instead, that many are asked for, and no more.
    Raises PromptError where it says neither."""
    include, exclude = field_of(prompt, "include"), field_of(prompt, "exclude")
    if include is None:
        asked = list(zip(field_of(prompt, "classes") or [], field_of(prompt, "counts") or [], strict=False))
        if not asked:
            raise PromptError(
                "--layout geneval: expected a prompt with GenEval's include, or classes and counts, got "
                f"{show(prompt)} alone; give GenEval's evaluation_metadata.jsonl as --prompts"
            )
        include = [{"class": kind, "count": count} for kind, count in asked if count]
        exclude = [{"class": kind, "count": count + 1} for kind, count in asked]
    tag = field_of(prompt, "tag") or "counting"
    return {"tag": tag, "include": include, **({"exclude": exclude} if exclude else {}), "prompt": str(prompt)}


def check_folders(out: Path, folders: Sequence[Path]) -> None:
    """Raises OutputError where the evaluator would find samples of other prompts."""
    known = {folder.name for folder in folders}
    others = sorted(path.parent.name for path in out.glob("*/samples") if path.parent.name.isdigit())
    others = [name for name in others if name not in known]
    if others:
        raise OutputError(
            f"{out} has samples of other prompts (folder {others[0]}"
            + f", and {len(others) - 1} more" * (len(others) > 1)
            + "), which GenEval would count too: remove them, or choose another --out"
        )


def remove_earlier(out: Path, folders: Sequence[Path], call: dict[str, Any], config: SearchConfig) -> None:
    """Removes samples that are of another call than this one and its repeats, but for those that it overwrites."""
    asked = json.dumps(call | config.model_dump(exclude=ANY), sort_keys=True, default=str)
    record = {"samples_of": hashlib.blake2b(asked.encode(), digest_size=16).hexdigest()}
    place = out / "samples.json"
    try:
        if json.loads(place.read_text()) == record:
            return
    except (OSError, ValueError):
        pass
    own = {sample_path(folder, config, number) for folder in folders for number in range(config.top_k)}
    for path in (path for folder in folders for path in folder.glob("samples/*")):
        if path.stem.isdigit() and path.suffix in (".png", ".mp4") and path not in own:
            path.unlink(missing_ok=True)
    write_json(place, record)


def sample_path(folder: Path, config: SearchConfig, place: int) -> Path:
    """Of the sample at `place` of the best."""
    return folder / "samples" / f"{config.repeat * config.top_k + place:05d}.png"
