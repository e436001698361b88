"""Builds the op library with CMake and Ninja; everything else about the package is in pyproject.toml.

`pip install --no-build-isolation -e .` or `python setup.py build_ext --inplace` put it at flowfast/lib/. Without a
compiler, CMake or PyTorch the install goes on without it: flowfast then runs its ops in plain PyTorch, more slowly.
FLOWFAST_CUDA=ON or OFF in the environment asks for the CUDA kernels or leaves them out; else CMakeLists.txt decides.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_namespace_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
LIBRARY = "flowfast/lib/libflowfast_ops.so"


class CMakeBuild(build_ext):
    """build_ext whose only extension is the shared library of CMakeLists.txt (no Python in it)."""

    def get_ext_filename(self, fullname: str) -> str:
        return LIBRARY

    def copy_extensions_to_source(self) -> None:
        (ROOT / LIBRARY).parent.mkdir(parents=True, exist_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        try:
            self.build_library(Path(self.build_lib).resolve() / LIBRARY)
        except (OSError, subprocess.CalledProcessError) as error:
            if os.environ.get("FLOWFAST_REQUIRE_LIBRARY"):
                raise
            warnings.warn(
                f"flowfast is installed without its compiled ops, which makes search slower: {error}. "
                "Install a C++20 compiler, cmake and ninja and run `python setup.py build_ext --inplace`.",
                stacklevel=1,
            )

    def build_library(self, target: Path) -> None:
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise FileNotFoundError(f"{tool} is not on PATH")
        build = ROOT / self.build_temp
        subprocess.run(
            ["cmake", "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
            + [f"-DPython3_EXECUTABLE={sys.executable}", f"-DFLOWFAST_LIBRARY_DIR={target.parent}"]
            + [f"-DFLOWFAST_CUDA={os.environ.get('FLOWFAST_CUDA', 'AUTO')}"],
            check=True,
        )
        subprocess.run(["cmake", "--build", str(build), "--target", "flowfast_ops"], check=True)


setup(
    packages=find_namespace_packages(include=["flowfast", "flowfast.*"]),
    ext_modules=[Extension("flowfast.lib.libflowfast_ops", sources=[], optional=True)],
    cmdclass={"build_ext": CMakeBuild},
)
