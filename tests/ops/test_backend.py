"""Loading the compiled library, falling back without it, and switching."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from triton_interpreter import require

import flowfast.ops
from flowfast.errors import FlowfastError, OptionError
from flowfast.ops import backend as backends
from flowfast.ops.compiled import remedy

ROOT = Path(__file__).parents[2]
COMPILED = flowfast.ops.instruction_set() != ""
needs_library = pytest.mark.skipif(not COMPILED, reason="no compiled library")


def run_python(code, **environment):
    """A fresh process; a backend is chosen at import."""
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return result.returncode, result.stdout, result.stderr


@needs_library
def test_schemas_of_library_and_python_are_the_same():
    defined = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("flowfast::")]
    assert sorted(f"flowfast::{name}" for name in backends.OPS) == sorted(defined)
    for name, op in backends.OPS.items():
        assert getattr(torch.ops.flowfast, name).default._schema == torch._C.parse_schema(f"flowfast::{op.schema}")


@needs_library
def test_every_op_has_a_compiled_kernel():
    live = flowfast.ops.live("cpu")
    assert {backend for backend, _ in live.values()} == {"cpp"}
    assert all(flowfast.ops.instruction_set() in reason for _, reason in live.values())


@needs_library
def test_switching_changes_what_runs_and_back():
    lane = torch.zeros(1, dtype=torch.int64)

    def fails_with():
        with pytest.raises(RuntimeError) as error:
            torch.ops.flowfast.normal_(torch.zeros(3), lane, lane, lane, lane, 0)
        return error.type

    assert fails_with() is RuntimeError
    with flowfast.ops.use_backend("reference"):
        assert {backend for backend, _ in flowfast.ops.live().values()} == {"reference"}
        assert issubclass(fails_with(), FlowfastError)  # only the Python kernel raises this one
        with flowfast.ops.use_backend("cpp"):
            assert fails_with() is RuntimeError
        assert issubclass(fails_with(), FlowfastError)
    assert fails_with() is RuntimeError
    assert {backend for backend, _ in flowfast.ops.live().values()} == {"cpp"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="triton runs on this machine")
@pytest.mark.parametrize("name", ["fast", "triton", "cuda"])
def test_unknown_and_absent_backends_are_named(name):
    with pytest.raises(OptionError, match=f"{name}.*choose"), flowfast.ops.use_backend(name):
        pass


def test_unknown_instruction_set_is_named():
    with pytest.raises(OptionError, match="'sse' does not run here"), flowfast.ops.use_instruction_set("sse"):
        pass


STEP = """
import torch, flowfast.ops
step = torch.jit.CompilationUnit('''
def step(x: Tensor, lane: Tensor, table: Tensor) -> Tensor:
    out = torch.zeros_like(x)
    torch.ops.flowfast.branch_step(x, x, lane, lane + 1, lane, lane, lane, table, out)
    return out
''').step
x = torch.linspace(-1, 1, 246).view(2, 123)
total = int(step(x, torch.arange(2), torch.linspace(-1, 1, 24).view(3, 8)).view(torch.int32).sum())
backends = {backend for backend, _ in flowfast.ops.live().values()}
print(backends, total)
"""


@needs_library
def test_without_the_library_the_reference_gives_the_same_bits_and_warns_once():
    here: dict = {}
    exec(STEP, here)
    assert here["backends"] == {"cpp"}
    code, output, error = run_python(STEP, FLOWFAST_LIBRARY="")
    assert code == 0, error
    assert output.strip() == f"{{'reference'}} {here['total']}"
    assert error.count("flowfast runs its ops in plain PyTorch") == 1
    assert remedy() in error


def test_a_damaged_library_falls_back(tmp_path):
    damaged = tmp_path / "libflowfast_ops.so"
    damaged.write_bytes(b"not a library")
    code, output, error = run_python(STEP, FLOWFAST_LIBRARY=str(damaged))
    assert code == 0 and output.startswith("{'reference'}"), error
    assert "no compiled library" in error and str(damaged) in error


INFO = """
import torch
torch.version.cuda = CUDA
import flowfast.ops
print(*flowfast.ops.libraries().values(), sep="; ")
print(*{f"{backend}: {reason}" for device in ("cpu", "cuda") for backend, reason in flowfast.ops.live(device).values()})
"""


def test_info_says_why_a_library_was_not_built(tmp_path):
    """setup.py leaves the reason where the library would be."""
    (tmp_path / "libflowfast_ops.txt").write_text("the compiler was out\n")
    (tmp_path / "libflowfast_ops_cuda.txt").write_text("nvcc was out\n")
    library = str(tmp_path / "libflowfast_ops.so")
    code, output, error = run_python(INFO.replace("CUDA", "'13.0'"), FLOWFAST_LIBRARY=library)
    assert code == 0, error
    assert f"not loaded: {library} does not exist: the compiler was out" in output
    assert "libflowfast_ops_cuda.so does not exist: nvcc was out" in output
    assert "reference: no compiled library" in output and remedy() in output
    assert "the compiler was out" in error


@needs_library
def test_a_cuda_library_that_does_not_load_costs_nothing_else(tmp_path):
    library = tmp_path / "libflowfast_ops.so"
    library.symlink_to(backends._cpu.path)
    cuda = tmp_path / "libflowfast_ops_cuda.so"
    cuda.write_bytes(b"not a library")
    for version, reason in (("'13.0'", f"not loaded: {cuda}: "), ("None", "has no CUDA")):  # the latter is not tried
        code, output, error = run_python(INFO.replace("CUDA", version), FLOWFAST_LIBRARY=str(library))
        assert code == 0 and error == "", error
        assert f"loaded from {library}" in output and "cpp: compiled library" in output
        assert reason in output and "reference: no compiled library" in output


def test_environment_forces_a_backend():
    code, output, error = run_python(STEP, FLOWFAST_BACKEND="reference")
    assert code == 0 and output.startswith("{'reference'}"), error
    code, _, error = run_python("import flowfast.ops", FLOWFAST_BACKEND="cpp", FLOWFAST_LIBRARY="")
    assert code == 1 and "FLOWFAST_BACKEND: backend cpp needs the compiled library" in error


TRITON_STEP = STEP.replace("print(", "print('triton' in __import__('sys').modules, ")


def test_triton_runs_interpreted_where_it_is_asked_for():
    require()
    code, output, error = run_python(STEP, FLOWFAST_BACKEND="triton", TRITON_INTERPRET="1")
    here: dict = {}
    exec(STEP, here)
    assert code == 0, error
    assert "'triton'" in output and output.split()[-1] == str(here["total"])


def test_triton_without_a_device_says_what_to_do():
    if torch.cuda.is_available():
        pytest.skip("triton runs on this machine")
    pytest.importorskip("triton", reason="triton is not installed")
    code, _, error = run_python("import flowfast.ops", FLOWFAST_BACKEND="triton", TRITON_INTERPRET="0")
    assert code == 1 and "FLOWFAST_BACKEND: backend triton needs a CUDA or ROCm device" in error
    assert "TRITON_INTERPRET=1" in error


def test_triton_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr(backends, "_has_triton", lambda: False)
    with pytest.raises(OptionError, match="needs triton: `pip install triton`"), flowfast.ops.use_backend("triton"):
        pass
    assert backends._forced == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a device its kernels are in use")
def test_triton_is_not_imported_on_a_machine_without_a_device():
    code, output, error = run_python(TRITON_STEP)
    assert code == 0 and output.startswith("False"), error


def test_triton_stands_first_on_a_device(monkeypatch):
    """Seen from a machine without one: the launchers are put behind the CUDA key and taken away again."""
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(backends, "_has_device", lambda: True)
    before = backends._has_kernel("gather_ancestors_", "CUDA")
    try:
        with flowfast.ops.use_backend("triton"):
            live = flowfast.ops.live()
            assert live["branch_step"][0] == "triton" and "4096 particles" in live["resample"][1]
            assert backends._has_kernel("gather_ancestors_", "CUDA")
            assert flowfast.ops.live("cpu")["branch_step"][0] != "triton"
        assert flowfast.ops.live("cuda")["gather_ancestors_"][0] == "triton"  # also where nobody asks
        with flowfast.ops.use_backend("reference"):
            assert flowfast.ops.live("cuda")["gather_ancestors_"][0] == "reference"
    finally:
        monkeypatch.undo()
        backends._force("", "test")
    assert backends._has_kernel("gather_ancestors_", "CUDA") == before
