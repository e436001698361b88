"""The CUDA kernels without a GPU: compiles every csrc/cuda/*.cu for sm_80, sm_90 and sm_100 and reads what came out.

    python -m bench.cuda_objects [--out build/cuda] [--torch 2.11.0]

Each file becomes a whole object (launchers and registration included, against torch's headers). What ptxas says gives
registers, spills, stack, shared memory and barriers of each kernel; the disassembly gives the width of the accesses and
the instructions a latent element, see `instructions`. nvcc is the machine's, else the one of the PyPI wheels
nvidia-cuda-nvcc, nvidia-nvvm, nvidia-cuda-crt, nvidia-cuda-runtime and nvidia-cuda-cccl; the disassembler comes from
the toolkit or with triton.

--torch compiles against the headers of another PyTorch, too: out of its wheel, which pip fetches (about a gigabyte) the
first time; they stay in build/torch-VERSION, and from then on every run takes them along.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

CSRC = Path(__file__).resolve().parent.parent / "csrc"
BUILD = CSRC.parent / "build"
INCLUDE = Path(torch.__path__[0]) / "include"
ARCHS = (80, 90, 100)
PROCESSES = 2
STEP_ELEMENTS = 32  # latent elements of a thread of the 16-bit branch_step kernel
STEP_ACCESSES = 8  # its 128-bit accesses: x and u in four planes; x' and x0_hat in four planes
STEP_ROOTS = 16  # its square roots: one for two normals
STEP_PRODUCTS = 8 * 17  # its Philox products: 8 counters of 20, but for the 3 that depend on the lane alone


class ToolMissing(RuntimeError):
    """A tool of the CUDA toolkit is neither on this machine nor among the installed wheels."""


@dataclass(frozen=True)
class Kernel:
    """What ptxas reports of one kernel on one architecture; bytes a thread for stack and spills, a block for shared."""

    source: str
    name: str
    symbol: str
    arch: int
    registers: int
    stack: int
    spills: int
    barriers: int
    shared: int


def _tool(name: str, *more: Path) -> Path:
    wheels = Path(sysconfig.get_path("purelib"))
    for folder in (None, *more, wheels / "nvidia/cu13/bin", wheels / "triton/backends/nvidia/bin"):
        found = shutil.which(name, path=None if folder is None else str(folder))
        if found:
            return Path(found)
    raise ToolMissing(f"{name} is neither on PATH nor in a wheel of this Python")


def find_nvcc() -> Path:
    """The machine's nvcc, else the one of the wheels.

    Raises:
        ToolMissing: there is neither.
    """
    try:
        return _tool("nvcc")
    except ToolMissing as error:
        raise ToolMissing(
            f"{error}, so the CUDA kernels are not compiled: install CUDA 13.0's nvcc or `pip install -e '.[cuda]'`"
        ) from None


def sources() -> list[Path]:
    return sorted((CSRC / "cuda").glob("*.cu"))


def compile_object(source: Path, out: Path, archs: tuple[int, ...] = ARCHS, include: Path = INCLUDE) -> str:
    """Compiles one file to `out`/<stem>.o for all architectures against torch's headers; returns what ptxas said. An
    object that is newer than its sources is taken as it is.

    Raises:
        RuntimeError: nvcc failed; with its output.
    """
    made, report = out / f"{source.stem}.o", out / f"{source.stem}.txt"
    inputs = [Path(__file__), *CSRC.rglob("*.h"), *CSRC.rglob("*.options"), source]
    if made.exists() and report.exists() and report.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return report.read_text()
    nvcc = find_nvcc()
    command = [str(nvcc), "-c", str(source), "-o", str(made)]
    command += ["--options-file", str(CSRC / "cuda/nvcc.options"), "-Xptxas", "-v", "-I", str(CSRC)]
    command += ["-isystem", str(include)]
    for arch in archs:
        command += ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
    report.write_text(done.stdout + done.stderr)
    return report.read_text()


def kernel_name(symbol: str) -> str:
    """A mangled kernel as it is read: branch_step_kernel<BFloat16, 8>."""
    match = re.search(r"\d+([a-z_]+_kernel)(?:I(.*?)EEv|E)", symbol)
    if match is None:
        return symbol
    base = re.sub(r"^.*?\d", "", match[1])
    if match[2] is None:
        return base
    kinds = {"f": "float", "d": "double", "b0": "false", "b1": "true"}
    parts = re.findall(r"N\w*?\d(BFloat16|Half)E?|L[ib](\d+)E?|^([fd])", match[2])
    flags = re.findall(r"L(b)?i?(\d+)", match[2])
    values = iter(flags)
    names = []
    for storage, number, scalar in parts:
        if number:
            is_bool, _ = next(values)
            names.append(kinds[f"b{number}"] if is_bool else number)
        else:
            names.append(storage or kinds[scalar])
    return f"{base}<{', '.join(names)}>"


def parse_report(source: str, report: str) -> list[Kernel]:
    """The kernels in the output of `nvcc -Xptxas -v`."""
    pattern = re.compile(
        r"Compiling entry function '(\w+)' for 'sm_(\d+)\w?'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+"
        r"ptxas info\s*: Used (\d+) registers, used (\d+) barriers(?:[^\n]*?(\d+) bytes smem)?",
        re.DOTALL,
    )
    kernels = []
    for symbol, arch, stack, stored, loaded, registers, barriers, shared in pattern.findall(report):
        spills = int(stored) + int(loaded)
        kernels.append(
            Kernel(
                source, kernel_name(symbol), symbol, int(arch), int(registers), int(stack), spills, int(barriers),
                int(shared or 0),
            )
        )  # fmt: skip
    if len(kernels) != report.count("Compiling entry function"):
        raise RuntimeError(f"{source}: the report of ptxas has a form that parse_report does not know:\n{report}")
    return kernels


def build(out: Path, archs: tuple[int, ...] = ARCHS, include: Path = INCLUDE) -> list[Kernel]:
    """Compiles all sources into `out`, two at a time; the report of every kernel."""
    out.mkdir(parents=True, exist_ok=True)
    with ThreadPoolExecutor(PROCESSES) as pool:
        reports = pool.map(lambda source: (source.stem, compile_object(source, out, archs, include)), sources())
        return [kernel for stem, report in reports for kernel in parse_report(stem, report)]


def fetch_headers(version: str) -> None:
    """Brings another PyTorch's headers to build/torch-<version>; kept ones stay.

    Raises:
        RuntimeError: pip found no such version; it has said why.
    """
    folder = BUILD / f"torch-{version}"
    if (folder / "torch/include").is_dir():
        return
    with tempfile.TemporaryDirectory() as temporary:
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", temporary, f"torch=={version}"]
        if subprocess.run(command, env=os.environ | {"PIP_CONSTRAINT": os.devnull}).returncode:
            raise RuntimeError(f"torch {version} could not be fetched")
        with zipfile.ZipFile(next(Path(temporary).glob("torch-*.whl"))) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if name.startswith("torch/include/")])


# The disassembly


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str  # "@P0", "" where it always runs
    opcode: str
    operands: str


def find_disassembler() -> tuple[Path, Path]:
    """cuobjdump and nvdisasm, which it calls.

    Raises:
        ToolMissing: one of them is not there.
    """
    cuobjdump = _tool("cuobjdump", find_nvcc().resolve().parent)
    return cuobjdump, _tool("nvdisasm", cuobjdump.parent)


def disassemble(path: Path) -> dict[tuple[int, str], list[Instruction]]:
    """The machine code of an object: (architecture, symbol) to instructions, without the NOPs behind the end."""
    cuobjdump, nvdisasm = find_disassembler()
    folders = {str(cuobjdump.parent), str(nvdisasm.parent)}
    environment = os.environ | {"PATH": os.pathsep.join([*folders, os.environ.get("PATH", "")])}
    text = subprocess.run(
        [str(cuobjdump), "-sass", str(path)], check=True, capture_output=True, text=True, env=environment
    ).stdout
    line = re.compile(
        r"code for sm_(\d+)|Function : (\w+)|^\s*/\*([0-9a-f]{4,})\*/\s+(?:(@!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?);", re.M
    )
    code: dict[tuple[int, str], list[Instruction]] = {}
    arch, body = 0, []
    for found in line.finditer(text):
        if found[1]:
            arch = int(found[1])
        elif found[2]:
            body = code.setdefault((arch, found[2]), [])
        elif found[5] != "NOP":
            body.append(Instruction(int(found[3], 16), found[4] or "", found[5], found[6]))
    return code


def accesses(body: list[Instruction]) -> dict[str, int]:
    """How many loads and stores of global memory there are of each width: {"LDG.128": 8, "LDG.32": 9, ...}."""
    count: dict[str, int] = {}
    for instruction in body:
        if instruction.opcode.split(".")[0] in ("LDG", "STG", "LD", "ST"):
            parts = instruction.opcode.split(".")
            width = next((part for part in parts if part in ("64", "128", "U8", "S8", "U16", "S16")), "32")
            key = f"{parts[0]}.{width.lstrip('US')}"
            count[key] = count.get(key, 0) + 1
    return count


def instructions(body: list[Instruction], loads: int, stores: int, roots: int, products: int) -> tuple[int, int]:
    """Fewest and most instructions that a thread issues in a run that does all the work: at least `loads` 128-bit
    loads, `stores` 128-bit stores, `roots` square roots and `products` 64-bit products.

    The kernel has no loops, so its runs are the paths of a graph without cycles and both are exact over all paths. The
    fewest are those of the plain case (no zero coefficient, no grad); a predicated instruction counts whether its
    predicate holds or not, and so does each store.

    Raises:
        RuntimeError: the code has a loop or a call.
    """
    index = {instruction.address: i for i, instruction in enumerate(body)}
    wanted = (loads, stores, roots, products)
    paths: list[dict[tuple[int, ...], tuple[int, int]]] = [{} for _ in body]  # work done from here on: fewest, most
    for i in reversed(range(len(body))):
        code = body[i]
        kind = code.opcode.split(".")[0]
        if kind in ("CALL", "RET", "BRX", "JMP", "JMX"):
            raise RuntimeError(f"{code.opcode} at {code.address:#x}: instructions are counted in code without calls")
        conditional = bool(code.predicate) or (kind == "BRA" and "," in code.operands)
        following = []
        if kind == "BRA":
            target = index[int(re.findall(r"0x([0-9a-f]+)", code.operands)[-1], 16)]
            if target == i:
                continue  # the trap behind the end
            if target < i:
                raise RuntimeError(f"a loop at {code.address:#x}: instructions are counted in code without loops")
            following.append(paths[target])
        if kind == "EXIT":
            following.append({(0, 0, 0, 0): (0, 0)})
        if conditional or kind not in ("BRA", "EXIT"):
            following.append(paths[i + 1] if i + 1 < len(body) else {})
        wide = ".128" in code.opcode
        step = (
            kind == "LDG" and wide,
            kind == "STG" and wide,
            code.opcode.startswith("MUFU.RSQ"),
            code.opcode.startswith("IMAD.WIDE"),
        )
        for successor in following:
            for work, (least, most) in successor.items():
                key = tuple(min(a + b, enough) for a, b, enough in zip(work, step, wanted, strict=True))
                known = paths[i].get(key, (least + 1, most + 1))
                paths[i][key] = (min(known[0], least + 1), max(known[1], most + 1))
    if wanted not in paths[0]:
        raise RuntimeError(f"no path makes {wanted} 128-bit loads, 128-bit stores, roots and products")
    return paths[0][wanted]


@dataclass(frozen=True)
class StepEvidence:
    """The 16-bit branch_step kernel: accesses, and instructions a latent element in the plain and the longest run."""

    arch: int
    name: str
    accesses: dict[str, int]
    plain: float
    longest: float


def step_evidence(out: Path, storage: str = "BFloat16") -> list[StepEvidence]:
    """From the object that `build` left in `out`; one for each architecture."""
    evidence = []
    for (arch, symbol), body in disassemble(out / "branch_step.o").items():
        name = kernel_name(symbol)
        if name == f"branch_step_kernel<{storage}, 8>":
            least, most = instructions(body, STEP_ACCESSES, STEP_ACCESSES, STEP_ROOTS, STEP_PRODUCTS)
            evidence.append(StepEvidence(arch, name, accesses(body), least / STEP_ELEMENTS, most / STEP_ELEMENTS))
    return evidence


def main() -> int:
    parser = argparse.ArgumentParser(description="compile the CUDA kernels without a GPU and report on them")
    parser.add_argument("--out", type=Path, default=BUILD / "cuda", help="folder for the objects")
    parser.add_argument("--torch", metavar="VERSION", help="against the headers of this PyTorch, too, as 2.11.0")
    options = parser.parse_args()
    out = options.out
    try:
        kernels = build(out)
        if options.torch:
            fetch_headers(options.torch)
        for folder in sorted(BUILD.glob("torch-*")):  # the host's half is what differs: one architecture will do
            build(out / folder.name, ARCHS[1:2], folder / "torch/include")
            print(f"compiles against the headers of {folder.name}, too")
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{'kernel':44} {'arch':>6} {'registers':>9} {'spills':>6} {'stack':>6} {'shared':>6} {'barriers':>8}")
    for k in sorted(kernels, key=lambda k: (k.name, k.arch)):
        print(f"{k.name:44} {k.arch:6} {k.registers:9} {k.spills:6} {k.stack:6} {k.shared:6} {k.barriers:8}")
    try:
        for step in step_evidence(out):
            print(
                f"{step.name} sm_{step.arch}: {step.plain:.1f} instructions an element, "
                f"{step.longest:.1f} in the longest run; {step.accesses}"
            )
    except ToolMissing as error:
        print(f"not disassembled: {error}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
