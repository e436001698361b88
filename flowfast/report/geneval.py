"""`flowfast generate --layout geneval`: the folders that GenEval's evaluate_images.py reads
(github.com/djghosh13/geneval).

00000/metadata.jsonl        tag, include, exclude and prompt of the first prompt
00000/samples/00000.png     its samples: the best of the search, then those of --top-k; --repeat 1 goes on behind them

The other files of generate lie beside them; where several repeats go into one folder, those of the last one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowfast.config import SearchConfig
from flowfast.errors import PromptError
from flowfast.prompts import field_of, show


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


def sample_path(folder: Path, config: SearchConfig, place: int) -> Path:
    """Of the sample at `place` of the best."""
    return folder / "samples" / f"{config.repeat * config.top_k + place:05d}.png"
