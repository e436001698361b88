"""The CUDA kernels compile for every architecture (`make slow`; `make test` takes sm_90), and what came out keeps its
bounds; nothing here needs a GPU.

What the kernels compute is tested on the CPU: csrc/tests/test_cuda_*.cpp run their threads (`make sanitize`).
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import cuda_objects
from flowfast.ops.backend import OPS

# Registers a thread. With 128 the step, 32 elements a thread, has 4 blocks of 128 threads on a multiprocessor.
REGISTERS = {
    "branch_step_kernel": 128, "noise_kernel": 80, "normalize_log_weights_kernel": 64, "resample_kernel": 64,
    "assign_lanes_kernel": 64, "decide_kernel": 80,
}  # fmt: skip
REGISTERS_ELSEWHERE = 40
# Where a block works together on a slot, or on all chains.
SHARED = {"normalize_log_weights_kernel", "resample_kernel", "assign_lanes_kernel", "decide_kernel"}
INSTRUCTIONS = {80: 46, 90: 46, 100: 37}  # a latent element of the 16-bit step


ALL = pytest.param(cuda_objects.ARCHS, marks=pytest.mark.slow, id="all")  # two minutes of nvcc


@pytest.fixture(scope="module", params=[ALL, pytest.param((90,), id="sm_90")])
def archs(request):
    return request.param


@pytest.fixture(scope="module")
def out(archs):
    """Kept between runs: only what changed is compiled again."""
    try:
        cuda_objects.find_nvcc()
    except cuda_objects.ToolMissing as error:
        pytest.skip(str(error))
    return cuda_objects.BUILD / ("cuda" if archs == cuda_objects.ARCHS else f"cuda-sm_{archs[0]}")


@pytest.fixture(scope="module")
def kernels(out, archs):
    return cuda_objects.build(out, archs)


@pytest.fixture(scope="module")
def disassembler(kernels):
    try:
        cuda_objects.find_disassembler()
    except cuda_objects.ToolMissing as error:
        pytest.skip(str(error))


def test_every_file_has_kernels_for_every_architecture(kernels, archs):
    found = {(kernel.source, kernel.arch) for kernel in kernels}
    assert found == {(source.stem, arch) for source in cuda_objects.sources() for arch in archs}
    names = {kernel.name for kernel in kernels}
    for storage, width in (("float", 4), ("BFloat16", 8), ("Half", 8)):
        for vector in (width, 1):
            assert f"branch_step_kernel<{storage}, {vector}>" in names
            assert f"posterior_mean_kernel<{storage}, {vector}>" in names


def test_registers_spills_shared_memory_and_barriers(kernels):
    for kernel in kernels:
        base = kernel.name.split("<")[0]
        assert kernel.spills == 0 and kernel.stack == 0, kernel
        assert kernel.registers <= REGISTERS.get(base, REGISTERS_ELSEWHERE), kernel
        if base not in SHARED:
            assert kernel.shared == 0 and kernel.barriers == 0, kernel


@pytest.mark.parametrize("op", ["branch_step", "noise", "posterior_mean", "gather_ancestors"])
def test_latents_move_in_128_bits(out, archs, disassembler, op):
    seen = 0
    for (_, symbol), body in cuda_objects.disassemble(out / f"{op}.o").items():
        name = cuda_objects.kernel_name(symbol)
        if not any(f"{start}{width}" in name for start in ("<", ", ") for width in ("4,", "4>", "8,", "8>", "16>")):
            continue  # single elements: rows that do not start at multiples of 16 bytes
        if name.split("<")[0] == "gather_ancestors_kernel" and "<16>" not in name:
            continue
        seen += 1
        widths = cuda_objects.accesses(body)
        marks = widths.pop("STG.8", 0)
        assert marks == (op == "posterior_mean"), (name, widths)  # of a lane that is broken, the only narrow store
        assert {width for width in widths if width.startswith("ST")} == {"STG.128"}, (name, widths)
        # What is narrower are columns of 64 bits and coefficients of 32, never a latent; both are read once a thread.
        assert not {"LDG.8", "LDG.16"} & widths.keys(), (name, widths)
        assert widths.get("LDG.32", 0) <= 9, (name, widths)
        if op != "noise":
            assert widths["LDG.128"] >= 2, (name, widths)
    assert seen >= len(archs)


def test_decide_moves_rows_in_128_bits(out, disassembler):
    """Child and sample, two latents each, four accesses of a thread under way together; nothing else is that wide."""
    for (_, symbol), body in cuda_objects.disassemble(out / "decide.o").items():
        widths = cuda_objects.accesses(body)
        wide = 16 if cuda_objects.kernel_name(symbol) == "decide_kernel<16>" else 0
        assert widths.get("LDG.128", 0) == widths.get("STG.128", 0) == wide, (symbol, widths)


@pytest.mark.parametrize("storage", ["BFloat16", "Half"])
def test_instructions_of_the_step(out, archs, disassembler, storage):
    evidence = {step.arch: step for step in cuda_objects.step_evidence(out, storage)}
    assert set(evidence) == set(archs)
    for arch, step in evidence.items():
        assert step.plain <= INSTRUCTIONS[arch], step
        assert step.plain < step.longest <= 1.3 * INSTRUCTIONS[arch], step


def test_the_launchers_need_no_newer_torch(tmp_path):
    """torch 2.10 and 2.11 have no STABLE_TORCH_ERROR_CODE_CHECK; the host's half of launch.h compiles without it."""
    try:
        toolkit = cuda_objects.find_nvcc().resolve().parent.parent
    except cuda_objects.ToolMissing as error:
        pytest.skip(str(error))
    folders = [folder for folder in (toolkit / "include", Path("/usr/local/cuda/include")) if folder.is_dir()]
    source = tmp_path / "launch.cpp"
    includes = "".join(f"#include <torch/csrc/stable/{name}.h>\n" for name in ("accelerator", "library", "tensor"))
    source.write_text(f'{includes}#undef STABLE_TORCH_ERROR_CODE_CHECK\n#include "cuda/launch.h"\n')
    command = ["c++", "-std=c++20", "-fsyntax-only", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
    command += ["-I", str(cuda_objects.CSRC), "-isystem", str(Path(torch.__path__[0]) / "include")]
    command += [part for folder in folders for part in ("-isystem", str(folder))]
    done = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_count_sees_every_path():
    """A small graph: 1 instruction, then 2 more or 4 more, an early end aside."""

    def code(address, opcode, operands="", predicate=""):
        return cuda_objects.Instruction(address, predicate, opcode, operands)

    body = [
        code(0x00, "EXIT", predicate="@P0"),
        code(0x10, "BRA", "0x40", predicate="@P1"),
        code(0x20, "FADD"),
        code(0x30, "FMUL"),
        code(0x40, "STG.E.128"),
        code(0x50, "EXIT"),
        code(0x60, "BRA", "0x60"),
    ]
    assert cuda_objects.instructions(body, 0, 1, 0, 0) == (4, 6)
    with pytest.raises(RuntimeError, match="no path"):
        cuda_objects.instructions(body, 0, 2, 0, 0)
    with pytest.raises(RuntimeError, match="loop"):
        cuda_objects.instructions([code(0x00, "FADD"), code(0x10, "BRA", "0x0", "@P0"), code(0x20, "EXIT")], 0, 0, 0, 0)


STUBS = """
#include <cstdint>
extern "C" {  // of libtorch_cuda, which a CPU build of PyTorch lacks
int32_t aoti_torch_get_current_cuda_stream(int32_t, void**) { return 1; }
int32_t torch_c10_cuda_check_msg(int32_t, const char*, const char*, uint32_t, bool, char**) { return 1; }
void torch_c10_cuda_free_error_msg(char*) {}
}
"""
LOAD = """
import sys, torch, flowfast.ops
has = lambda name: torch._C._dispatch_has_kernel_for_dispatch_key("flowfast::" + name, "CUDA")
before = [name for name in flowfast.ops.backend.OPS if has(name)]
torch.ops.load_library(sys.argv[1])
print(*before, "|", *[name for name in flowfast.ops.backend.OPS if has(name)])
"""


def test_the_objects_link_and_register_every_op(out, kernels, tmp_path):
    """As a library of its own, with stand-ins for what a CPU build of PyTorch lacks."""
    stubs, library = tmp_path / "stubs.cpp", tmp_path / "libcuda_ops.so"
    stubs.write_text(STUBS)
    objects = [str(out / f"{source.stem}.o") for source in cuda_objects.sources()]
    nvcc = cuda_objects.find_nvcc()
    folders = [
        "-L",
        str(Path(torch.__path__[0]) / "lib"),
        "-L",
        str(nvcc.parent.parent / "lib"),
    ]  # the wheel has no lib64
    command = [str(nvcc), "-shared", "-Xcompiler=-fPIC", str(stubs), *objects, *folders, "-ltorch_cpu"]
    command += ["-o", str(library)]
    subprocess.run(command, check=True)
    done = subprocess.run([sys.executable, "-c", LOAD, str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    before, after = done.stdout.split("|")
    assert before.split() == []
    assert set(after.split()) == set(OPS)
