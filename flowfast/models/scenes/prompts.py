"""The hard prompt set: distinct prompts of 2-3 phrases and 3-5 objects, many with a relation, split once by a hash."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources
from typing import Literal

import numpy as np

from flowfast.models.scenes.data import sample_scene

Split = Literal["tuning", "heldout", "all"]


def split_of(prompt: str) -> Literal["tuning", "heldout"]:
    """The half a prompt belongs to: the lowest bit of the first byte of its SHA-256."""
    return "heldout" if hashlib.sha256(prompt.encode()).digest()[0] & 1 else "tuning"


@cache
def _all_prompts() -> tuple[str, ...]:
    text = resources.files("flowfast.models.scenes").joinpath("hard_prompts.txt").read_text(encoding="utf-8")
    return tuple(line for line in text.splitlines() if line)


def hard_prompts(split: Split = "tuning") -> list[str]:
    """Prompts of one half or of both ("all"), in file order. Choose nothing by looking at the held-out half."""
    if split not in ("tuning", "heldout", "all"):
        raise ValueError(f"unknown split {split!r}; choose 'tuning', 'heldout' or 'all'")
    return [p for p in _all_prompts() if split == "all" or split_of(p) == split]


def make_hard_prompts(n: int = 240, seed: int = 7) -> list[str]:
    """How hard_prompts.txt was made: n distinct prompts, a fifth with 3 objects, two fifths each with 4 and 5.

    Those of 3 objects have a relation, those of 4 three phrases, those of 5 two or three: what plain sampling finds
    easy is left out, so that search at hundreds of evaluations still has something to do.
    """
    rng = np.random.default_rng(seed)
    out: dict[str, None] = {}
    while len(out) < n:
        total = (3, 4, 4, 5, 5)[len(out) % 5]
        scene = sample_scene(rng, total, relation_share=0.7)
        hard = len(scene.phrases) == 3 if total < 5 else len(scene.phrases) >= 2
        if hard and (total > 3 or scene.relation is not None):
            out[scene.text()] = None
    return list(out)
