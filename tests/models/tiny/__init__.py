"""Tiny randomly initialised diffusers pipelines, one family a file, built from configs; no file is downloaded."""

import importlib
from pathlib import Path

from tests.models.tiny.case import Case

MODULES = [
    importlib.import_module(f"tests.models.tiny.{path.stem}")
    for path in sorted(Path(__file__).parent.glob("*.py"))
    if path.stem not in ("__init__", "case", "edits", "parts")
]
"""The families: each module has CASES, name: Case."""

__all__ = ["MODULES", "Case"]
