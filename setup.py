"""Builds the op libraries with CMake and Ninja; everything else about the package is in pyproject.toml.

`pip install .` and `python -m build` put them at flowfast/lib/ in one wheel for every Python and PyTorch, `pip install
-e .` and `python setup.py build_ext --inplace` into the source tree. Where a library is missing there, a text file of
its name says why, and `flowfast info` shows it. In the environment:

    FLOWFAST_REQUIRE_LIBRARY  unset: a build that fails is an error, but without a C++ compiler the install goes on, and
                              flowfast runs its ops in plain PyTorch, more slowly; 1: that is an error, too; 0: none is
    FLOWFAST_CUDA             ON or OFF asks for the CUDA kernels or leaves them out; else CMakeLists.txt decides, and a
                              CUDA library that cannot be built costs nothing else
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "csrc"))

from build_backend import find_compiler, find_torch  # noqa: E402

FOLDER = Path("flowfast/lib")


class NotBuilt(Exception):
    """Why there is no library, and what to do."""


class CMakeBuild(build_ext):
    """build_ext whose extensions are the shared libraries of CMakeLists.txt (no Python in them)."""

    def get_ext_filename(self, fullname: str) -> str:
        return f"{fullname.replace('.', '/')}.so"

    def copy_extensions_to_source(self) -> None:
        shutil.rmtree(ROOT / FOLDER, ignore_errors=True)
        shutil.copytree(Path(self.build_lib) / FOLDER, ROOT / FOLDER)

    def build_extensions(self) -> None:
        folder = Path(self.build_lib).resolve() / FOLDER
        shutil.rmtree(folder, ignore_errors=True)  # nothing of an earlier build comes along
        folder.mkdir(parents=True)
        required = os.environ.get("FLOWFAST_REQUIRE_LIBRARY", "")
        try:
            self.build_libraries(folder)
        except NotBuilt as error:
            if required == "1" or (required != "0" and find_compiler()):
                raise SystemExit(
                    f"flowfast: its compiled ops were not built: {error}. "
                    "FLOWFAST_REQUIRE_LIBRARY=0 in the environment installs without them: search is slower then."
                ) from None
            note(folder / "libflowfast_ops.so", str(error))

    def build_libraries(self, folder: Path) -> None:
        compiler, torch, build = find_compiler(), find_torch(), ROOT / self.build_temp
        if compiler is None:
            raise NotBuilt("no C++ compiler was found: install g++ (or put one in CXX)")
        if torch is None:
            raise NotBuilt(
                f"{sys.executable} has no PyTorch from 2.10 on: install it first or leave out --no-build-isolation"
            )
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise NotBuilt(f"{tool} is not on PATH: `pip install cmake ninja`, or leave out --no-build-isolation")
        (build / "CMakeCache.txt").unlink(missing_ok=True)  # of an isolated build: its PyTorch and its ninja are gone
        cuda = os.environ.get("FLOWFAST_CUDA", "AUTO")
        run(
            *("cmake", "-S", ROOT, "-B", build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release", f"-DTORCH_ROOT={torch}"),
            *(f"-DFLOWFAST_LIBRARY_DIR={folder}", f"-DFLOWFAST_CUDA={cuda}"),
        )
        run("cmake", "--build", build, "--target", "flowfast_ops")
        if (folder / "libflowfast_ops_cuda.txt").exists():  # CMake says there why it is off
            return
        try:
            run("cmake", "--build", build, "--target", "flowfast_ops_cuda")
        except NotBuilt as error:
            if cuda == "ON":
                raise
            note(folder / "libflowfast_ops_cuda.so", str(error))


def run(*command: str | Path) -> None:
    """Runs a command, whose output is the build's."""
    done = subprocess.run(list(map(str, command)))
    if done.returncode:
        raise NotBuilt(f"`{' '.join(map(str, command))}` failed with exit code {done.returncode} (pip -v shows why)")


def note(library: Path, reason: str) -> None:
    """Says why a library is missing: now, and where `flowfast info` finds it."""
    library.with_suffix(".txt").write_text(f"{reason}\n")
    warnings.warn(f"flowfast is installed without {library.name}: {reason}", stacklevel=1)


class BuildWheel(bdist_wheel):
    """One wheel for every Python, as no file in it depends on one."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    packages=find_namespace_packages(include=["flowfast", "flowfast.*"], exclude=["flowfast.lib"]),
    ext_modules=[
        Extension(f"flowfast.lib.{name}", [], optional=True) for name in ("libflowfast_ops", "libflowfast_ops_cuda")
    ],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": BuildWheel},
)
