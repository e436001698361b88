"""How long files, classes and functions of flowfast may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST = {"file": 450, "class": 250, "function": 60}
"""Lines, those of docstrings and signatures too."""
SOURCES = [path for path in sorted((ROOT / "flowfast").rglob("*.py")) if "lib" not in path.parts]


def lengths(source: str) -> dict[tuple[str, str], int]:
    """Lines by (kind, name): ("file", "file"), ("class", "A"), ("function", "A.f")."""
    found = {("file", "file"): len(source.splitlines())}
    waiting: list[tuple[ast.AST, str]] = [(ast.parse(source), "")]
    while waiting:
        outer, prefix = waiting.pop()
        for node in ast.iter_child_nodes(outer):
            name = prefix
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                kind = "class" if isinstance(node, ast.ClassDef) else "function"
                name = f"{prefix}.{node.name}".lstrip(".")
                found[kind, name] = (node.end_lineno or 0) - node.lineno + 1
            waiting.append((node, name))
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_too_long(path: Path) -> None:
    for (kind, name), count in lengths(path.read_text()).items():
        where = f"{path.relative_to(ROOT)}: {kind} {name}"
        assert count <= MOST[kind], f"{where} has {count} lines, at most {MOST[kind]}: cut it"


def test_the_counting_sees_methods_and_functions_inside() -> None:
    inner = ["    def f(self):", "        if True:", "            def g():", "                pass"]
    source = "\n".join(["class A:", *inner, "", "", "def h(): ..."])
    assert lengths(source) == {
        ("file", "file"): 8, ("class", "A"): 5, ("function", "A.f"): 4, ("function", "A.f.g"): 2, ("function", "h"): 1
    }  # fmt: skip
