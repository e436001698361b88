"""What the Triton kernels compile to, without a GPU: registers, spills, shared memory, barriers, widths, SASS.

    python -m bench.evidence [--json FILE]

Every kernel is compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 with the arguments of a FLUX latent (pointers
and n divisible by 16, RUN chunks a program); ptxas, cuobjdump and nvdisasm come with triton. Exit code 1 if one of
the bounds of `exceeded` is; tests/test_evidence.py says the same. Kernels that work on weights and on the state of a
search may use shared memory and barriers; theirs are shown.

Instructions an element are counted along the executed path, not in the listing. The listing is cut into basic blocks;
of all ways through them, loops included, on which a program stores each of its elements once (and takes the square root
of each pair of normals once), the one with the fewest instructions is the branch for coefficients that are not zero:
its instructions, prologue included and predicated ones counted as executed, over the elements of a thread.
"""

from __future__ import annotations

import argparse
import heapq
import json
import re
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flowfast.kernels import (
    assign_lanes,
    branch_step,
    decide,
    gather_ancestors,
    noise,
    normalize_log_weights,
    posterior_mean,
    resample,
)
from flowfast.ops import RESAMPLING

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TARGETS = {f"sm_{arch}": GPUTarget("cuda", arch, 32) for arch in (80, 90, 100)} | {
    "gfx942": GPUTarget("hip", "gfx942", 64)
}
JUMPS = ("BRA", "CALL")  # ptxas leaves a loop with a call that never returns (CALL.REL.NOINC)
RUN = 4  # chunks a program, as for a batch that fills the device

COLUMN = "*i64"
ADDRESS = {"key_ptr": COLUMN, "row_ptr": COLUMN, "candidate_ptr": COLUMN, "chain_ptr": COLUMN}
SIZES = {"n": "i32", "run": "i32"}


class Case(NamedTuple):
    """A kernel, its arguments but for the latents' type, and what a program of it reads and writes.

    planar: BLOCKS * 256 elements a chunk and one warp; else CHUNK elements and four. copies: chunks are only moved, in
    so many places of the kernel, beside work on the state of a search.
    """

    kernel: Any
    dtype: str
    latents: tuple[str, ...]  # pointers to latents
    arguments: dict[str, str]  # the others
    constants: dict[str, Any]
    loads: int  # latents read an element
    stores: int  # and written
    planar: bool = True
    normals: bool = False
    copies: int = 0

    def streams(self) -> bool:
        """Whether it works on latents and nothing else: no shared memory, no barrier, instructions counted."""
        return bool(self.latents) and not self.copies

    def chunk(self, target: GPUTarget) -> int:
        return target.warp_size // 8 * 256 if self.planar else int(self.constants["CHUNK"])

    def warps(self) -> int:
        return 1 if self.planar else 4


def _step(dtype: str, grad: bool) -> Case:
    latents = ("x_ptr", "u_ptr", "out_ptr", "x0_out_ptr") + (("grad_ptr",) if grad else ())
    arguments = {"parent_ptr": COLUMN, **ADDRESS, "table_ptr": "*fp32", "iota_ptr": "*i32", **SIZES}
    constants = {} if grad else {"grad_ptr": None}
    return Case(branch_step._branch_step_kernel, dtype, latents, arguments, constants, 2 + grad, 2, normals=True)


def _noise(dtype: str) -> Case:
    arguments = {**ADDRESS, "iota_ptr": "*i32", **SIZES, "purpose": "i32"}
    return Case(noise._noise_kernel, dtype, ("out_ptr",), arguments, {"NORMAL": True}, 0, 1, normals=True)


def _mean(dtype: str) -> Case:
    latents = ("x_ptr", "u_ptr", "uncond_ptr", "u_out_ptr", "x0_out_ptr")
    arguments = {"guidance_ptr": "*fp32", "row_ptr": COLUMN, "table_ptr": "*fp32", "broken_ptr": "*i1", **SIZES}
    kernel, constants = posterior_mean._posterior_mean_kernel, {"CHUNK": posterior_mean.CHUNK}
    return Case(kernel, dtype, latents, arguments, constants, 3, 2, planar=False)


def _gather(dtype: str) -> Case:
    kernel, constants = gather_ancestors._gather_ancestors_kernel, {"CHUNK": gather_ancestors.CHUNK}
    return Case(kernel, dtype, ("x_ptr", "u_ptr"), {"ancestors_ptr": COLUMN, **SIZES}, constants, 2, 2, planar=False)


# Types of the state of a search by the names of the pointers to it; the others are columns of integers.
_FLOATS = {"rewards_ptr", "bias_ptr", "floats_ptr", "temperature", "margin"}
_FLOATS |= {"weights_ptr", "log_weights_ptr", "ess_ptr", "log_normalizer_ptr"}
_BOOLS = {"flags_ptr", "enabled_ptr"}


def _state(kernel: Any, latents: tuple[str, ...] = (), copies: int = 0, **constants: Any) -> Case:
    arguments = {}
    for name in kernel.arg_names:
        kind = "fp32" if name in _FLOATS else "i1" if name in _BOOLS else "i64" if name.endswith("_ptr") else "i32"
        arguments[name] = "*" * name.endswith("_ptr") + kind
    return Case(kernel, "bf16", latents, arguments, constants, copies, copies, planar=False, copies=copies)


def _decide() -> Case:
    """Chains of 4 lanes and the 4 best samples: moved in six places, between lanes, store and samples."""
    latents = ("x_lane_ptr", "u_lane_ptr", "x0_lane_ptr", "x_ptr", "u_ptr", "top_x_ptr", "top_x0_ptr")
    constants = {"CARRY": True, "PLACES": 4, "CHUNK": decide.CHUNK, "COLUMNS": 4}
    return _state(decide._decide_kernel, latents, 6, **constants)


def _resample(scheme: str) -> Case:
    return _state(resample._resample_kernel, SCHEME=RESAMPLING[scheme], SIZE=1024, LOG=10)


CASES = {
    "branch_step bf16": _step("bf16", False),
    "branch_step bf16 grad": _step("bf16", True),
    "branch_step fp16": _step("fp16", False),
    "branch_step fp32": _step("fp32", False),
    "normal_ bf16": _noise("bf16"),
    "posterior_mean bf16": _mean("bf16"),
    "gather_ancestors_ bf16": _gather("bf16"),
    "decide bf16": _decide(),
    "assign_lanes": _state(assign_lanes._assign_lanes_kernel, COLUMNS=4),
    "normalize_log_weights": _state(
        normalize_log_weights._normalize_log_weights_kernel, CHUNK=normalize_log_weights.CHUNK
    ),
    "resample systematic": _resample("systematic"),
    "resample residual": _resample("residual"),
    "resample ssp": _resample("ssp"),
}


@dataclass
class Row:
    """One line of the table. Widths, in bits, are those of latents, 0: it has none; instructions an element are None
    where they are not counted (gfx942, and kernels that do more than to work on latents)."""

    kernel: str
    target: str
    registers: int
    spills: int
    shared: int
    barriers: int
    load_bits: int
    store_bits: int
    instructions: float | None


def compile_case(case: Case, target: GPUTarget, ones: bool = False, guarded: bool = True) -> Any:
    """The compiled kernel with the specialisation that a launch on a FLUX latent would get.

    ones: that of a launch whose integers are all 1, which Triton makes constants, but for those that the kernel guards
    by do_not_specialize; guarded=False: those too.
    """
    names = case.kernel.arg_names
    constants = case.constants | {"EVEN": not ones, "PTX": target.backend == "cuda"}
    if case.planar:
        constants["BLOCKS"] = target.warp_size // 8
    constants["THREADS"] = threads = case.warps() * target.warp_size
    if "COLUMNS" in constants:
        constants["CHAINS"] = threads // constants["COLUMNS"]  # as `tile` in kernels/assign_lanes.py
    signature = case.arguments | dict.fromkeys(case.latents, f"*{case.dtype}")
    if ones:
        for parameter in case.kernel.params:
            if signature.get(parameter.name) == "i32" and not (guarded and parameter.do_not_specialize):
                constants.setdefault(parameter.name, 1)
    constants = {name: constants[name] for name in constants if name in names}
    full = {name: "constexpr" if name in constants else signature[name] for name in names}
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(names)
        if full[name][0] == "*" or (name == "n" and case.latents and full[name] == "i32")
    }
    source = ASTSource(case.kernel, full, {(names.index(k),): v for k, v in constants.items()}, aligned)
    return triton.compile(source, target=target, options={"num_warps": case.warps(), "enable_fp_fusion": False})


class Instruction(NamedTuple):
    address: int
    predicated: bool
    opcode: str
    target: str  # label of a branch


def parse_sass(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions and the index of the one after each label."""
    instructions: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(instructions)
        elif found := re.match(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+ )?\s*([A-Z][A-Z0-9_.]*)(.*)", line):
            jump = re.search(r"\(?(\.L_x_\d+)", found[4])
            instructions.append(Instruction(int(found[1], 16), bool(found[2]), found[3], jump[1] if jump else ""))
    return instructions, labels


def executed(
    instructions: list[Instruction], labels: dict[str, int], stored: int, store_bytes: dict[str, int], roots: int
) -> Counter[str]:
    """Opcodes along the shortest path to EXIT that stores `stored` bytes a thread and takes `roots` roots."""

    def bytes_of(opcode: str) -> int:
        return store_bytes.get(opcode, 0)

    starts = {0, *labels.values()}
    starts |= {i + 1 for i, one in enumerate(instructions) if one.opcode.split(".")[0] in (*JUMPS, "EXIT")}
    bounds = sorted(start for start in starts if start < len(instructions)) + [len(instructions)]
    blocks = {a: instructions[a:b] for a, b in zip(bounds, bounds[1:], strict=False)}
    cost: dict[tuple[int, int, int], int] = {(0, 0, 0): 0}
    before: dict[tuple[int, int, int], tuple[int, int, int]] = {}
    queue = [(0, (0, 0, 0))]
    while queue:
        spent, state = heapq.heappop(queue)
        if spent > cost[state]:
            continue
        start, saved, taken = state
        block = blocks[start]
        saved += sum(bytes_of(one.opcode) for one in block if not one.predicated)
        taken += sum(one.opcode.startswith("MUFU.RSQ") for one in block)
        last = block[-1]
        kind = last.opcode.split(".")[0]
        if kind == "EXIT" and saved == stored and taken == roots:
            path = Counter(one.opcode for one in block)
            while state in before:
                state = before[state]
                path.update(one.opcode for one in blocks[state[0]])
            return path
        follow = []
        if kind in JUMPS and last.target in labels:
            follow.append(labels[last.target])
        if kind not in (*JUMPS, "EXIT") or last.predicated or (kind == "BRA" and ".U" in last.opcode):
            follow.append(start + len(block))
        for after in follow:
            new = (after, saved, taken)
            total = spent + len(block)
            if after in blocks and saved <= stored and taken <= roots and total < cost.get(new, sys.maxsize):
                cost[new], before[new] = total, state
                heapq.heappush(queue, (total, new))
    raise ValueError(f"no path stores {stored} bytes and takes {roots} roots")


def _bits(opcode: str) -> int:
    """Bits of a thread's access: LDG.E.128, STG.E.U16, LDG.E ..."""
    widths = {"U8": 8, "S8": 8, "U16": 16, "S16": 16, "64": 64, "128": 128, "256": 256}
    return next((widths[part] for part in opcode.split(".") if part in widths), 32)


def _tool(name: str, *arguments: str) -> str:
    return subprocess.run([str(TOOLS / name), *arguments], check=True, capture_output=True, text=True).stdout


def nvidia_row(name: str, case: Case, target_name: str) -> Row:
    target = TARGETS[target_name]
    compiled = compile_case(case, target)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _tool("cuobjdump", "-res-usage", file.name)
        listing = _tool("nvdisasm", "-c", file.name)
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", usage)}
    instructions, labels = parse_sass(listing)
    local = sum(one.opcode.startswith(("LDL", "STL")) for one in instructions)
    loads, stores, count = _streamed(case, target, instructions, labels) if case.streams() else (0, 0, None)
    if case.copies:
        opcodes = [one.opcode for one in instructions]
        loads, stores = (_copied(case, target, [_bits(o) for o in opcodes if o.startswith(k)]) for k in ("LDG", "STG"))
    return Row(
        name,
        target_name,
        used["REG"],
        local + used["STACK"] + used["LOCAL"],
        used["SHARED"] if target_name == "sm_80" and case.streams() else compiled.metadata.shared,
        sum(one.opcode.startswith("BAR") for one in instructions),
        loads,
        stores,
        count,
    )


def _streamed(
    case: Case, target: GPUTarget, instructions: list[Instruction], labels: dict[str, int]
) -> tuple[int, int, float]:
    """Widths of loads and stores along the executed path, and its instructions an element."""
    item = {"fp32": 4}.get(case.dtype, 2)
    elements = RUN * case.chunk(target) // (case.warps() * target.warp_size)
    widths = {one.opcode: _bits(one.opcode) // 8 for one in instructions if one.opcode.startswith("STG")}
    roots = elements // 2 if case.normals else 0
    path = executed(instructions, labels, elements * item * case.stores, widths, roots)
    # Columns and coefficients are 32 or 64 bits wide and read once a program: RUN chunks of latents in narrower loads
    # would leave the wide ones short of what has to be read.
    read = Counter[int]()
    for opcode, count in path.items():
        if opcode.startswith("LDG"):
            read[_bits(opcode)] += count
    wide = read[128] * 16 + read[256] * 32 >= elements * item * case.loads
    return (
        128 if wide else max((bits for bits in read if bits < 128), default=0),
        min(_bits(opcode) for opcode in path if opcode.startswith("STG")),
        round(path.total() / elements, 2),
    )


def _copied(case: Case, target: GPUTarget, widths: list[int]) -> int:
    """128 if there are wide accesses enough for every place of the kernel that moves a chunk, and none of 16 bits:
    what else the kernel reads and writes has 8, 32 or 64."""
    needed = case.copies * case.chunk(target) * 2 // (case.warps() * target.warp_size * 16)
    return 128 if sum(width >= 128 for width in widths) >= needed and 16 not in widths else min(widths)


def amd_row(name: str, case: Case, target_name: str) -> Row:
    compiled = compile_case(case, TARGETS[target_name])
    text = compiled.asm["amdgcn"]

    def field(key: str) -> int:
        return int(re.search(rf"\.{key}:\s+(\d+)", text)[1])  # type: ignore[index]

    def widths(kind: str) -> list[int]:
        """Of accesses to latents, 16 bits and more: marks are bytes."""
        found = re.findall(rf"(?:global|buffer)_{kind}_(?:dword(?:x(\d))?\b|(u?short))", text)
        return [16 if short else int(number or 1) * 32 for number, short in found]

    if case.copies:
        target = TARGETS[target_name]
        loads, stores = _copied(case, target, widths("load")), _copied(case, target, widths("store"))
    else:
        loads, stores = max(widths("load"), default=0) * case.streams(), min(widths("store")) * case.streams()
    return Row(
        name,
        target_name,
        field("vgpr_count"),
        field("vgpr_spill_count") + field("sgpr_spill_count"),
        compiled.metadata.shared,
        len(re.findall(r"\bs_barrier\b", text)),
        loads,
        stores,
        None,
    )


def evidence(name: str, target: str) -> Row:
    return (amd_row if target == "gfx942" else nvidia_row)(name, CASES[name], target)


class Bounds(NamedTuple):
    """What a version of Triton is held to."""

    instructions: dict[str, tuple[float, float, float]]  # an element, on sm_80, sm_90, sm_100
    spills: dict[tuple[str, str], int]  # elsewhere none


# By the version of Triton that they were measured with; instructions are rounded up to the next half. The spills are
# scalar registers of gfx942, kept in lanes of vector ones, not in memory.
BOUNDS = {
    (3, 6): Bounds(
        {
            "branch_step bf16": (42.5, 42.5, 36.0),
            "branch_step bf16 grad": (44.5, 44.5, 37.5),
            "branch_step fp16": (42.5, 42.5, 36.0),
            "branch_step fp32": (40.0, 40.5, 40.5),
            "normal_ bf16": (33.5, 33.5, 27.5),
            "posterior_mean bf16": (13.5, 13.0, 12.0),
            "gather_ancestors_ bf16": (3.0, 3.0, 3.0),
        },
        {("branch_step bf16 grad", "gfx942"): 3, ("decide bf16", "gfx942"): 82},
    ),
    (3, 9): Bounds(
        {
            "branch_step bf16": (41.5, 41.0, 33.5),
            "branch_step bf16 grad": (43.5, 43.5, 35.0),
            "branch_step fp16": (41.5, 41.0, 34.5),
            "branch_step fp32": (39.5, 39.0, 39.0),
            "normal_ bf16": (32.5, 32.5, 27.5),
            "posterior_mean bf16": (13.5, 13.0, 12.0),
            "gather_ancestors_ bf16": (3.5, 3.0, 3.0),
        },
        {
            ("branch_step bf16 grad", "gfx942"): 3,
            ("decide bf16", "gfx942"): 62,
            ("assign_lanes", "gfx942"): 4,
            ("resample ssp", "gfx942"): 2,
        },
    ),
}


def bounds(version: str = triton.__version__) -> Bounds:
    """Those of a version of Triton, else of the one before it that was measured, else of the first."""
    release = tuple(map(int, version.split(".")[:2]))
    return BOUNDS[max((known for known in BOUNDS if known <= release), default=min(BOUNDS))]


def exceeded(row: Row) -> list[str]:
    """What breaks a bound; empty if nothing does. Kernels on latents alone: no shared memory, no barrier."""
    case, held = CASES[row.kernel], bounds()
    wrong = [f"{what} {getattr(row, what)}" for what in ("shared", "barriers") if case.streams() and getattr(row, what)]
    wrong += [f"spills {row.spills}"] if row.spills > held.spills.get((row.kernel, row.target), 0) else []
    if case.latents and (row.store_bits != 128 or (row.load_bits != 128 and case.loads)):
        wrong.append(f"load_bits {row.load_bits}, store_bits {row.store_bits}")
    bound = dict(zip(TARGETS, held.instructions.get(row.kernel, ()), strict=False)).get(row.target)
    if row.instructions is not None and bound is not None and row.instructions > bound:
        wrong.append(f"instructions {row.instructions} > {bound}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.evidence", description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the rows here too")
    parser.add_argument("names", nargs="*", help=f"of {', '.join(CASES)}; none: all")
    options = parser.parse_args()
    rows, failed = [], False
    print(
        f"{'kernel':24}{'target':>8}{'regs':>6}{'spills':>8}{'shared':>8}{'bar':>5}{'load':>6}{'store':>7}{'SASS/element':>14}"
    )
    for name in options.names or CASES:
        for target in TARGETS:
            row = evidence(name, target)
            rows.append(row)
            count = "-" if row.instructions is None else f"{row.instructions:.2f}"
            wrong = exceeded(row)
            failed |= bool(wrong)
            print(
                f"{row.kernel:24}{row.target:>8}{row.registers:6}{row.spills:8}{row.shared:8}{row.barriers:5}"
                f"{row.load_bits:6}{row.store_bits:7}{count:>14}  {'; '.join(wrong)}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n", encoding="utf-8")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
