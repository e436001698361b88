"""The two compiled libraries of `flowfast/lib`, which setup.py builds: found, loaded, and if not: why, and what to do.

`libflowfast_ops.so` has the schemas of all ops and their CPU kernels, `libflowfast_ops_cuda.so` the CUDA kernels alone.
Each can be missing, or fail to load, without the other. Where one was not built, a text file in its place says why.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import torch

PACKAGE = Path(__file__).resolve().parent.parent
CPU, CUDA = "libflowfast_ops.so", "libflowfast_ops_cuda.so"


class Library(NamedTuple):
    """A compiled library: loaded, or why not ("" where it is)."""

    path: Path
    obstacle: str


def load() -> tuple[Library, Library]:
    """Loads what there is, the library of the CPU first.

    FLOWFAST_LIBRARY names another build of it (a sanitizer build, say), whose CUDA library lies beside it; empty: none.
    """
    named = os.environ.get("FLOWFAST_LIBRARY", str(PACKAGE / "lib" / CPU))
    cpu, cuda = Path(named), Path(named).with_name(CUDA) if named else Path(CUDA)
    if not named:
        return Library(cpu, "FLOWFAST_LIBRARY is empty"), Library(cuda, "FLOWFAST_LIBRARY is empty")
    without_cuda = torch.version.cuda is None and f"this PyTorch ({torch.__version__}) has no CUDA"
    return Library(cpu, _load(cpu)), Library(cuda, without_cuda or _load(cuda))


def _load(path: Path) -> str:
    """Loads one library; "", or why that is not possible."""
    note = path.with_suffix(".txt")
    if not path.exists():
        why = f": {note.read_text(encoding='utf-8').strip()}" if note.exists() else ""
        return f"{path} does not exist{why}"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        return str(error.__cause__ or error)  # torch's own says no more than the path
    return ""


def remedy() -> str:
    """What builds the libraries, for this kind of install."""
    root = PACKAGE.parent
    if (root / "setup.py").exists() and (root / "csrc").is_dir():
        return f"`python setup.py build_ext --inplace` in {root} builds the fast ones (it needs g++, cmake and ninja)"
    return (
        "install g++, then flowfast again from where it came: `FLOWFAST_REQUIRE_LIBRARY=1 pip install "
        "--force-reinstall --no-deps --no-cache-dir ...` builds the fast ones or says why not"
    )
