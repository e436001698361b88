"""How long files, classes and functions of flowfast may be."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
MOST = {"file": 450, "class": 250, "function": 60}
"""Lines, those of docstrings and signatures too."""
LONGER = {
    ("flowfast/engine/driver.py", "file"): 710,  # one call of `search`, with three lifetimes in one class
    ("flowfast/engine/driver.py", "Driver"): 640,
    ("flowfast/engine/driver.py", "Driver.__init__"): 90,
}
"""What is longer, and may become shorter only."""
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
    place = str(path.relative_to(ROOT))
    for (kind, name), count in lengths(path.read_text()).items():
        most = LONGER.get((place, name), MOST[kind])
        assert count <= most, f"{place}: {kind} {name} has {count} lines, at most {most}: cut it"


def test_what_is_longer_is_there_and_close_to_its_length() -> None:
    """A length that was brought down stays down."""
    for (place, name), most in LONGER.items():
        (count,) = [count for (_, each), count in lengths((ROOT / place).read_text()).items() if each == name]
        assert most - 20 < count <= most, f"{place}: {name} has {count} lines now: say so, or take it off the list"


def test_the_counting_sees_methods_and_functions_inside() -> None:
    inner = ["    def f(self):", "        if True:", "            def g():", "                pass"]
    source = "\n".join(["class A:", *inner, "", "", "def h(): ..."])
    assert lengths(source) == {
        ("file", "file"): 8, ("class", "A"): 5, ("function", "A.f"): 4, ("function", "A.f.g"): 2, ("function", "h"): 1
    }  # fmt: skip
