"""The build backend of pyproject.toml: that of setuptools, which asks for PyTorch only where there is none.

The op libraries are compiled with PyTorch's headers and stand on its stable ABI, so the headers of any PyTorch from
2.10 on will do: those of the environment that pip runs in, although build isolation hides them from the build.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import site
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  the hooks that are not defined below

OLDEST = (2, 10)
REQUIREMENT = "torch>=2.10,<2.14"  # the newest is the one that constraints.txt has: a later one may lack a wheel


def find_torch() -> Path | None:
    """The folder of the first PyTorch that the libraries can be built with; it is read, not imported."""
    spec = importlib.util.find_spec("torch")
    folders = [Path(spec.origin).parent] if spec is not None and spec.origin else []
    site_packages = [Path(path) for path in site.getsitepackages()]  # of the environment, also in build isolation
    if sys.prefix == sys.base_prefix:
        site_packages.append(Path(site.getusersitepackages()))
    if active := os.environ.get("VIRTUAL_ENV"):  # `python -m build` makes an environment of its own
        site_packages += Path(active).glob("lib/python3*/site-packages")
    folders += [path / "torch" for path in site_packages]
    return next((folder for folder in folders if _fits(folder)), None)


def _fits(torch: Path) -> bool:
    """Whether a folder holds headers and library of a PyTorch that is new enough."""
    needed = ("version.py", "include/torch/csrc/stable/library.h", "lib/libtorch_cpu.so")
    if not all((torch / name).is_file() for name in needed):
        return False
    version = re.search(r"__version__ = '(\d+)\.(\d+)", (torch / "version.py").read_text())
    return version is not None and (int(version[1]), int(version[2])) >= OLDEST


def find_compiler() -> str | None:
    """The C++ compiler that CMake will take; None where there is none."""
    asked = os.environ.get("CXX", "").split()
    return next(filter(None, map(shutil.which, asked[:1] or ("c++", "g++", "clang++"))), None)


def _torch_if_needed() -> list[str]:
    return [REQUIREMENT] if find_compiler() and not find_torch() else []


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_wheel(config_settings) + _torch_if_needed()


def get_requires_for_build_editable(config_settings: dict | None = None) -> list[str]:
    return build_meta.get_requires_for_build_editable(config_settings) + _torch_if_needed()
