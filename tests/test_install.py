"""Building and installing: what setup.py does where something is missing or fails, and, slow, the wheel itself."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
TREE = ("csrc", "flowfast", "kernels", "setup.py", "pyproject.toml", "CMakeLists.txt", "MANIFEST.in", "LICENSE")
LIBRARY, CUDA_LIBRARY = "flowfast/lib/libflowfast_ops.so", "flowfast/lib/libflowfast_ops_cuda.so"


def run(folder: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in a folder, away from this repository's sources and settings."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("FLOWFAST", "PYTHONPATH", "CXX"))}
    return subprocess.run(
        [str(word) for word in command], cwd=folder, env=own | environment, capture_output=True, text=True, timeout=600
    )


# ---- setup.py with tools that are missing or fail: scripts in their place ----

CMAKE = """#!/bin/sh
for word in "$@"; do
  case "$word" in -DFLOWFAST_LIBRARY_DIR=*) echo "${word#*=}" > folder;; flowfast_ops*) target=$word;; esac
done
read folder < folder
case "$target" in "") ;; "$FAILS") exit 3;; flowfast_ops*) echo > "$folder/lib$target.so";; esac
"""


@pytest.fixture
def build(tmp_path):
    """build("c++", "cmake", ...) runs `setup.py build_ext --inplace` where these are all the tools there are."""
    source, bin = tmp_path / "source", tmp_path / "bin"
    for name in ("setup.py", "csrc/build_backend.py"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    bin.mkdir()

    def start(*tools: str, **environment: str) -> tuple[int, str]:
        for tool in tools:
            (bin / tool).write_text(CMAKE if tool == "cmake" else "#!/bin/sh\n")
            (bin / tool).chmod(0o755)
        done = run(source, sys.executable, "setup.py", "build_ext", "--inplace", PATH=str(bin), **environment)
        return done.returncode, done.stderr

    start.source = source
    return start


def test_without_a_compiler_the_install_goes_on_and_says_so(build):
    code, said = build("cmake", "ninja")
    assert code == 0 and "without libflowfast_ops.so: no C++ compiler was found: install g++" in said
    assert "no C++ compiler" in (build.source / LIBRARY).with_suffix(".txt").read_text()  # `flowfast info` shows it
    code, said = build("cmake", "ninja", FLOWFAST_REQUIRE_LIBRARY="1")
    assert code == 1 and "its compiled ops were not built: no C++ compiler was found" in said


@pytest.mark.parametrize(
    ("tools", "fails", "reason"),
    [
        (("c++", "ninja"), "", "cmake is not on PATH"),
        (("c++", "cmake"), "", "ninja is not on PATH"),
        (("c++", "cmake", "ninja"), "flowfast_ops", "failed with exit code 3"),
    ],
)
def test_with_a_compiler_a_build_that_fails_is_an_error(build, tools, fails, reason):
    code, said = build(*tools, FAILS=fails)
    assert code == 1 and reason in said and "FLOWFAST_REQUIRE_LIBRARY=0" in said
    assert "Traceback" not in said and not (build.source / "flowfast/lib").exists()
    code, said = build(*tools, FAILS=fails, FLOWFAST_REQUIRE_LIBRARY="0")
    assert code == 0 and reason in said and not (build.source / LIBRARY).exists()
    assert reason in (build.source / LIBRARY).with_suffix(".txt").read_text()


def test_cuda_kernels_that_cannot_be_built_cost_nothing_else(build):
    tools = ("c++", "cmake", "ninja")
    code, said = build(*tools, FAILS="flowfast_ops_cuda")
    assert code == 0 and "without libflowfast_ops_cuda.so" in said and (build.source / LIBRARY).exists()
    assert "exit code 3" in (build.source / CUDA_LIBRARY).with_suffix(".txt").read_text()
    code, said = build(*tools, FAILS="flowfast_ops_cuda", FLOWFAST_CUDA="ON")  # asked for by name
    assert code == 1 and "exit code 3" in said
    code, said = build(*tools, FAILS="")
    assert code == 0 and (build.source / CUDA_LIBRARY).exists()
    assert not (build.source / CUDA_LIBRARY).with_suffix(".txt").exists()  # nothing of an earlier build stays


# ---- where the build finds PyTorch ----


@pytest.fixture
def backend(monkeypatch):
    """csrc/build_backend.py in build isolation: torch cannot be imported."""
    spec = importlib.util.spec_from_file_location("build_backend", ROOT / "csrc/build_backend.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(module.site, "getsitepackages", lambda: [])
    monkeypatch.setattr(module.site, "getusersitepackages", lambda: "/nowhere")
    monkeypatch.setattr(module.build_meta, "get_requires_for_build_wheel", lambda settings: [])
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    return module


def fake_torch(folder: Path, version: str) -> Path:
    for name in ("include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so"):
        (folder / "torch" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "torch" / name).touch()
    (folder / "torch/version.py").write_text(f"__all__ = ['__version__']\n__version__ = '{version}'\n")
    return folder / "torch"


def test_torch_is_found_where_pip_runs(backend, tmp_path, monkeypatch):
    old, good = fake_torch(tmp_path / "old", "2.9.1+cpu"), fake_torch(tmp_path / "good", "2.10.0")
    monkeypatch.setattr(backend.site, "getsitepackages", lambda: [str(old.parent), str(good.parent)])
    assert backend.find_torch() == good
    assert backend.get_requires_for_build_wheel() == []
    (good / "lib/libtorch_cpu.so").unlink()  # of a distribution that puts it elsewhere
    assert backend.find_torch() is None


def test_torch_of_the_active_environment_is_found(backend, tmp_path, monkeypatch):
    torch = fake_torch(tmp_path / "lib/python3.12/site-packages", "2.13.0+cpu")
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    assert backend.find_torch() == torch


def test_torch_is_asked_for_only_where_it_is_needed(backend, monkeypatch):
    monkeypatch.setattr(backend, "find_compiler", lambda: "/usr/bin/c++")
    assert backend.get_requires_for_build_wheel() == [backend.REQUIREMENT]
    pin = next(line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    newest = int(pin.split(".")[1])
    assert backend.REQUIREMENT.endswith(f"<2.{newest + 1}"), "the newest torch that is tested"
    monkeypatch.setattr(backend, "find_compiler", lambda: None)  # no gigabytes for nothing
    assert backend.get_requires_for_build_wheel() == []


# ---- the wheel ----


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The sources, without what was built."""
    folder = tmp_path_factory.mktemp("source")
    for name in (*TREE, "README.md"):
        kept = shutil.ignore_patterns("__pycache__", "lib")
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, symlinks=True, ignore=kept)
        else:
            shutil.copy(ROOT / name, folder / name)
    return folder


def pip_wheel(source: Path, out: Path, *more: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "-w", out, *more, source)
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return run(out.parent, *command, **({"PATH": path} | environment))


def info(wheel: Path, folder: Path) -> dict:
    """What `flowfast info` says once the wheel is installed."""
    done = run(folder, sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", folder, wheel)
    assert done.returncode == 0, done.stderr
    done = run(folder, sys.executable, "-m", "flowfast.cli", "info", "--json", PYTHONPATH=str(folder))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    """Built as `python -m build` does it: from the source distribution."""
    out = tmp_path_factory.mktemp("dist")
    done = run(source, sys.executable, "setup.py", "-q", "sdist", "-d", out)
    assert done.returncode == 0, done.stderr
    done = pip_wheel(next(out.glob("*.tar.gz")), out)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(out.glob("*.whl"))


@pytest.mark.slow
def test_one_wheel_for_every_python(wheel):
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    expected = {
        str(path.relative_to(ROOT))
        for suffix in ("py", "safetensors", "json", "txt", "typed", "html", "css", "js")
        for path in [*(ROOT / "flowfast").rglob(f"*.{suffix}"), *(ROOT / "flowfast/kernels").glob(f"*.{suffix}")]
        if "lib" not in path.parts
    }
    assert expected | {LIBRARY} <= names
    assert not [name for name in names if not name.startswith(("flowfast/", "flowfast-"))]


@pytest.mark.slow
def test_the_library_has_no_python_and_no_rpath(wheel, tmp_path):
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract(LIBRARY, tmp_path)
    dynamic = run(tmp_path, "readelf", "-d", library).stdout
    assert "libtorch_cpu.so" in dynamic and "RPATH" not in dynamic and "RUNPATH" not in dynamic
    assert "libpython" not in dynamic and "libtorch_python" not in dynamic
    assert " Py" not in run(tmp_path, "nm", "-D", "--undefined-only", library).stdout


@pytest.mark.slow
def test_an_installed_wheel_runs_the_compiled_ops(wheel, tmp_path):
    found = info(wheel, tmp_path)
    assert {op["backend"] for op in found["ops"].values()} == {"cpp"}
    assert str(tmp_path) in found["libraries"]["libflowfast_ops.so"]


@pytest.mark.slow
def test_an_install_without_a_compiler_says_what_to_do(source, tmp_path):
    (tmp_path / "bin").mkdir()
    done = pip_wheel(source, tmp_path / "out", "-v", PATH=str(tmp_path / "bin"))
    assert done.returncode == 0, done.stderr
    (op,) = {tuple(op.values()) for op in info(next((tmp_path / "out").glob("*.whl")), tmp_path)["ops"].values()}
    assert op[0] == "reference" and "no C++ compiler was found" in op[1]
    assert "FLOWFAST_REQUIRE_LIBRARY=1 pip install --force-reinstall" in op[1]


@pytest.mark.slow
def test_pip_shows_why_a_build_fails(source, tmp_path):
    broken = tmp_path / "source"
    shutil.copytree(source, broken, symlinks=True)
    (broken / "csrc/ops.cpp").write_text("#error a slip\n")
    done = pip_wheel(broken, tmp_path / "out")
    assert done.returncode != 0
    assert "#error a slip" in done.stderr and "FLOWFAST_REQUIRE_LIBRARY=0" in done.stderr
