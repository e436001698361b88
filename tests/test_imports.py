"""Who may import whom (docs/design.md), read off the syntax trees, and what the source may not contain at all."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flowfast"

# everyone may import these
LEAVES = {"bounds", "errors", "files", "memory", "prompts", "secrets", "surroundings", "types", "version"}
# The other parts, bottom first, with what each may import beside the leaves and itself.
MAY_IMPORT: dict[str, set[str]] = {
    **dict.fromkeys(LEAVES, set()),
    "version": {"ops"},
    "kernels": set(),
    "ops": {"kernels"},
    "flow": set(),
    "config": {"flow"},
    "methods": {"flow", "ops"},
    "rounds": {"flow", "ops"},
    "models": {"flow", "methods", "ops"},
    "rewards": {"flow", "models", "ray"},  # ray: when a reward of that kind is asked for
    "resolve": {"config", "flow", "methods", "models", "rounds"},
    "calibration": {"config", "methods", "models", "resolve", "rewards"},
    "engine": {"calibration", "config", "methods", "models", "ops", "resolve", "rewards", "rounds"},
    "archive": {"calibration", "config", "methods", "models", "ops", "resolve", "rewards", "rounds"},
    "pool": {"calibration", "config", "engine", "ops", "resolve"},
    "api": {"calibration", "config", "engine", "models", "pool", "resolve", "rewards"},
    "report": {"api", "calibration", "config", "engine", "models"},
    "calibrate": {"api", "calibration", "config", "report", "resolve", "rewards"},
    "comparison": {"api", "config", "models", "report", "resolve", "rewards"},
    "serve": {"config", "engine", "methods", "rewards"},
    "ray": {"api", "calibration", "config", "engine", "models", "report", "resolve", "rewards", "serve"},
    "benchmark": {"config", "engine", "models", "report", "rewards"},
    "cli": {
        "api", "archive", "benchmark", "calibrate", "calibration", "comparison", "config", "flow", "methods", "models",
        "ops", "ray", "report", "rewards", "serve",
    },
}  # fmt: skip
HUGGING_FACE = {"diffusers", "transformers"}
# These derive from classes of diffusers; they are imported when they are asked for.
ON_DEMAND = {Path(f"models/diffusers/{name}.py") for name in ("scheduler", "sde_scheduler", "after_step")}
SOURCES = sorted(path for path in PACKAGE.rglob("*.py") if "lib" not in path.relative_to(PACKAGE).parts)


def part_of(path: Path) -> str:
    """The part of the package a file belongs to: "ops", "engine", ... ("" for flowfast/__init__.py)."""
    first = path.relative_to(PACKAGE).parts[0]
    return "" if first == "__init__.py" else first.removesuffix(".py")


def imports_of(tree: ast.AST) -> list[str]:
    """Absolute names that a module imports anywhere, in functions and under TYPE_CHECKING too."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute in flowfast"
            names += [f"{node.module}.{alias.name}" for alias in node.names]
    return names


def imports_at_load(tree: ast.Module) -> list[str]:
    """What runs on import: everything outside functions and outside `if TYPE_CHECKING`."""
    names, stack = [], list(tree.body)
    while stack:
        node = stack.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import | ast.ImportFrom):
            names += imports_of(node)
        stack += list(ast.iter_child_nodes(node))  # type: ignore[arg-type]
    return names


def violations(part: str, source: str) -> list[str]:
    """Imports of one module's source that its part may not have."""
    tree = ast.parse(source)
    allowed = MAY_IMPORT[part] | LEAVES | {part}
    bad = []
    for name in imports_of(tree):
        top, _, rest = name.partition(".")
        target = rest.split(".")[0]
        if top == "flowfast" and target in MAY_IMPORT and target not in allowed:
            bad.append(name)
        if part == "kernels" and top not in {"torch", "triton", "__future__"} | sys.stdlib_module_names:
            bad.append(name)
        if top in HUGGING_FACE and part not in {"models", "rewards"}:
            bad.append(name)
        if top == "ray" and part != "ray":
            bad.append(name)
    return bad + at_load(tree)


def at_load(tree: ast.Module) -> list[str]:
    return [name for name in imports_at_load(tree) if name.partition(".")[0] in HUGGING_FACE]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_boundaries(path: Path) -> None:
    part = part_of(path)
    if part:
        assert part in MAY_IMPORT, f"new part {part!r}: say in MAY_IMPORT and docs/design.md what it may import"
        allowed = at_load(ast.parse(path.read_text())) if path.relative_to(PACKAGE) in ON_DEMAND else []
        assert [name for name in violations(part, path.read_text()) if name not in allowed] == []


@pytest.mark.parametrize(
    ("part", "source"),
    [
        ("ops", "from flowfast.flow import schedule"),
        ("flow", "def f():\n    import flowfast.rounds.batch"),
        ("rounds", "from flowfast.methods.plan import Plan"),
        ("methods", "from flowfast.rounds.state import State"),
        ("resolve", "from flowfast.rewards import load"),
        ("archive", "from flowfast.engine.core import EngineCore"),
        ("engine", "from flowfast.archive.load import load_archive"),
        ("rewards", "from flowfast import engine"),
        ("engine", "from flowfast.cli import main"),
        ("kernels", "import numpy"),
        ("models", "import diffusers"),
        ("engine", "def f():\n    import transformers"),
        ("serve", "def f():\n    import ray.data"),
    ],
)
def test_the_boundary_test_sees_a_breach(part: str, source: str) -> None:
    assert violations(part, source)


def module_of(path: Path) -> str:
    """ "flowfast.rounds.batch" of flowfast/rounds/batch.py, "flowfast.rounds" of its __init__.py."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def edges(sources: dict[str, str]) -> dict[str, set[str]]:
    """The modules that each one needs to load: those it names, and the packages that these lie in, where it does not
    lie in them itself."""
    found: dict[str, set[str]] = {}
    for module, source in sources.items():
        found[module] = set()
        for name in imports_at_load(ast.parse(source)):
            words = name.split(".")
            prefixes = [".".join(words[:n]) for n in range(1, len(words) + 1)]
            known = [prefix for prefix in prefixes if prefix in sources]
            found[module] |= {prefix for prefix in known if not module.startswith(f"{prefix}.")} | set(known[-1:])
    return found


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The strongly connected components of more than one module."""

    def reached(module: str) -> set[str]:
        seen, stack = set[str](), [module]
        while stack:
            new = graph.get(stack.pop(), set()) - seen
            seen |= new
            stack += new
        return seen

    behind = {module: reached(module) for module in graph}
    groups = {frozenset(m for m in behind[module] if module in behind[m]) for module in graph}
    return sorted(sorted(group) for group in groups if len(group) > 1)


def test_no_modules_import_each_other_in_a_circle() -> None:
    sources = {module_of(path): path.read_text() for path in SOURCES}
    assert len(sources) > 100
    assert circles(edges(sources)) == []


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("flowfast.rounds.state", "from flowfast.rounds.batch import SlotBatch"),  # in one package
        ("flowfast.methods.plan", "from flowfast import methods"),  # the package itself, which imports its modules
        ("flowfast.errors", "from flowfast.resolve import resolve"),  # far round
    ],
)
def test_the_circle_test_sees_one(module: str, line: str) -> None:
    sources = {module_of(path): path.read_text() for path in SOURCES}
    sources[module] += f"\n{line}\n"
    assert any(module in circle for circle in circles(edges(sources)))


def test_a_circle_that_only_functions_close_is_none() -> None:
    sources = {"flowfast.a": "import flowfast.b", "flowfast.b": "def f():\n    import flowfast.a"}
    assert circles(edges(sources)) == []


def test_few_modules_lie_directly_in_the_package() -> None:
    assert len([path for path in SOURCES if path.parent == PACKAGE]) <= 14


def test_import_flowfast_is_light() -> None:
    heavy = sorted(HUGGING_FACE | {"matplotlib", "scipy", "typer"})
    code = f"import sys, flowfast; print([m for m in {heavy} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "[]"


def test_triton_folder_is_linked_and_not_a_package() -> None:
    link = PACKAGE / "kernels"
    assert link.is_symlink()
    assert link.readlink() == Path("../kernels")
    assert not (ROOT / "kernels" / "__init__.py").exists()  # it would shadow Hugging Face's package `kernels`


# Weights are safetensors, configurations plain YAML, and nothing listens beyond loopback unless told to.
FORBIDDEN = {
    "pickle": r"^\s*(?:import|from)\s+(?:pickle|cloudpickle|dill|joblib|shelve|marshal)\b",
    "torch.load": r"\btorch\.load\s*\(",
    "eval or exec": r"(?<![\w.])(?:eval|exec)\s*\(",
    "yaml.load": r"\byaml\.(?:unsafe_|full_)?load(?:_all)?\s*\(",
    "trust_remote_code": r"trust_remote_code\s*=\s*True",
    "bind beyond loopback": r"[\"']0\.0\.0\.0[\"']",
    "shell": r"shell\s*=\s*True|\bos\.system\s*\(",
}


def forbidden_in(source: str) -> list[str]:
    return [name for name, pattern in FORBIDDEN.items() if re.search(pattern, source, re.MULTILINE)]


@pytest.mark.parametrize(
    "path",
    [*SOURCES, ROOT / "setup.py", ROOT / "csrc/build_backend.py", *sorted((ROOT / "bench").rglob("*.py"))],
    ids=lambda p: str(p.relative_to(ROOT)),
)
def test_nothing_unsafe_in_the_source(path: Path) -> None:
    assert forbidden_in(path.read_text()) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "    from joblib import load",
        "x = torch.load('w.pt')",
        "y = eval(text)",
        "yaml.load(f)",
        "yaml.unsafe_load(f)",
        "from_pretrained(n, trust_remote_code=True)",
        "uvicorn.run(app, host='0.0.0.0')",
        "subprocess.run(c, shell=True)",
    ],
)
def test_the_grep_sees_it(source: str) -> None:
    assert forbidden_in(source)


def test_the_grep_lets_pass() -> None:
    assert forbidden_in("model.eval()\nyaml.safe_load(f)\nsafetensors.torch.load_file(p)\nevaluate(x)") == []


NAMED = re.compile(
    r"(?<![\w./{-])((?:flowfast|csrc|kernels|bench|tests|docs|examples)/[\w/.-]*\w\.(?:py|h|cpp|cu|md|jsonl?|sh|yaml|toml))\b"
)
TEXTS = sorted(
    path
    for folder in ("flowfast", "csrc", "kernels", "bench", "tests", "docs", "examples")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".h", ".cpp", ".cu", ".md") and path.is_file()
) + [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "Makefile", "CMakeLists.txt", "setup.py")]
ELSEWHERE = {
    "flowfast/searcher.h",  # as it is installed
    "bench/results/gpu.json",  # as it is written on a GPU
    "flowfast/searcher/loop.py",  # below
}


def test_files_that_are_named_exist() -> None:
    """In comments, docstrings and documents; the CHANGELOG tells of files as they were."""
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in TEXTS
        for name in NAMED.findall(path.read_text(errors="replace"))
        if name not in ELSEWHERE and not any((near / name).exists() for near in (ROOT, ROOT / "csrc", path.parent))
    }
    assert not missing, "\n".join(sorted(missing))


def test_a_file_that_is_gone_is_seen() -> None:
    assert NAMED.findall("see flowfast/searcher/loop.py, and csrc/core/round.h.") == [
        "flowfast/searcher/loop.py",
        "csrc/core/round.h",
    ]
