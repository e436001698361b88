"""The torch-free tests of csrc/tests under AddressSanitizer and UBSan (`make sanitize`), and mutants that they kill."""

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = "flowfast_core_tests"


def run(program, *parts):
    return subprocess.run([str(program), *parts], capture_output=True, text=True)


@pytest.fixture(scope="module")
def build():
    """The build folder; kept between runs, so only what changed is compiled again."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    for tool in ("c++", "cmake", "ninja"):
        if shutil.which(tool, path=path) is None:
            pytest.skip(f"{tool} is not on PATH, and there is nothing to sanitize without it")
    folder = ROOT / "build/sanitize"
    configure = ["cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", "-DFLOWFAST_SANITIZE=ON"]
    configure += ["-DCMAKE_EXPORT_COMPILE_COMMANDS=ON"]
    for command in (configure, ["cmake", "--build", str(folder)]):
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
        assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_core_is_clean(build):
    done = run(build / PROGRAM)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "all checks passed" in done.stdout


# A slip in a header; the one file that is compiled again with it; the part of the tests that sees it; what the
# sanitizer, or the check, calls it.
MUTANTS = {
    "a row that ends with its block": (
        "cpu/kernels.h", "const int64_t end = smaller(begin + kBlock, task.end)", "const int64_t end = begin + kBlock",
        "cpu/simd_scalar.cpp", "simd", "AddressSanitizer",
    ),
    "a short vector taken for a whole one": (
        "cpu/kernels.h", "count >= V::kWidth) return V::load(data)", "count >= V::kWidth - 1) return V::load(data)",
        "cpu/simd_avx2.cpp", "simd", "AddressSanitizer",
    ),
    "a half that is always rounded up": (
        "cpu/simd_avx2.cpp", "add(a, add(both(right<16>(a), word(1)), word(0x7fff)))", "add(a, word(0x8000))",
        "cpu/simd_avx2.cpp", "simd", "seed",
    ),
    "a NaN that the sum of all forgets": (
        "cpu/kernels.h", "sound = V::fma(sum[0], sum[1], sound);", "sound = V::fma(sum[0], sum[1], V::real(0.0f));",
        "cpu/simd_avx2.cpp", "simd", "seed",
    ),
    "a first round without the candidate": (
        "core/philox.h", "(row >> 32) ^ address.candidate ^", "(row >> 32) ^",
        "tests/test_core.cpp", "core", "word 0 is",
    ),
    "a last round with the halves changed over": (
        "cpu/kernels.h", "V::high_words(p1_even, p1_odd)", "V::high_words(p1_odd, p1_even)",
        "cpu/simd_avx2.cpp", "simd", "avx2, n = 1",
    ),
    "a block done again over its own input": (
        "cpu/kernels.h", "if (all && task.out != task.x)", "if (all)",
        "cpu/simd_avx2.cpp", "simd", "in place",
    ),
    "a GPU thread that writes behind the row": (
        "cuda/noise.h", "element + kCounters < task.n", "element + kCounters <= task.n",
        "tests/test_cuda_threads.cpp", "threads", "AddressSanitizer",
    ),
    "a chain that takes one lane too many": (
        "cuda/assign_lanes.h", "tile.sum[c] && i < width", "tile.sum[c] && i <= width",
        "tests/test_cuda_rounds.cpp", "rounds", "lanes, seed",
    ),
    "books kept by the block that comes first": (
        "cuda/decide.h", "take_ticket(task.round.ticket) == blocks - 1", "take_ticket(task.round.ticket) == 0",
        "tests/test_cuda_rounds.cpp", "rounds", "the books of round",
    ),
    "samples that move from the first place down": (
        "cuda/decide.h", "for (int64_t j = r.top - 1; j >= 0; --j) {", "for (int64_t j = 0; j < r.top; ++j) {",
        "tests/test_cuda_rounds.cpp", "rounds", "the books of round",
    ),
    "a product of more than 63 bits": (
        "core/resample.h", "(w * (total >> 31) + (w * (total & 0x7fffffff) >> 31)) >> 1", "w * total >> 32",
        "tests/test_core.cpp", "core", "signed integer overflow",
    ),
    "lanes that nobody scores before the others": (
        "core/round.h", "if (is_scored(r, b) == others) continue;", "if (is_scored(r, b) != others) continue;",
        "tests/test_round.cpp", "round", "lane 0",
    ),
    "a score with its centre": (
        "core/round.h", "const float centred = reward - r.centre[r.transition(b)]", "const float centred = reward",
        "tests/test_round.cpp", "round", "first child, centre 1.5",
    ),
    "a threshold with its centre": (
        "core/round.h", "threshold = child_reward - r.centre[at];", "threshold = child_reward;",
        "tests/test_round.cpp", "round", "threshold, centre 1.5",
    ),
    "a picture that nobody looks at": (
        "core/round.h", " || !is_finite(r.image_sum[i])", "",
        "tests/test_round.cpp", "round", "sum inf",
    ),
    "passes of the next transition": (
        "core/round.h", "kNfe, s), spent * r.passes[at])", "kNfe, s), spent * r.passes[at + 1])",
        "tests/test_round.cpp", "round", "of_slot(kNfe, 0) == 24",
    ),
    "an evaluation that costs one NFE whatever its passes": (
        "core/round.h", "kLeft, b) -= spent * r.passes[at];", "kLeft, b) -= spent;",
        "tests/test_round.cpp", "round", "38 left",
    ),
    "a quota that pays for its own transition, too": (
        "core/round.h", "r.to_end[at + 1];", "r.to_end[at];",
        "tests/test_round.cpp", "round", "quota 0 of 5 left at 1",
    ),
    "a quota that pays one NFE for an evaluation": (
        "core/round.h", "spare / r.passes[at]", "spare",
        "tests/test_round.cpp", "round", "quota 2 of 5 left at 1",
    ),
    "lanes of the null pass in another order": (
        "core/round.h", "r.null_lane[guided++] = lane;", "r.null_lane[guided++] = i - 1 - lane;",
        "tests/test_round.cpp", "round", "null lane 0 is 4",
    ),
    "padding that takes the null pass": (
        "core/round.h", "for (int64_t lane = 0; lane < i; ++lane)", "for (int64_t lane = 0; lane < r.widest; ++lane)",
        "tests/test_round.cpp", "round", "null lane 3 is 5",
    ),
    "guidance without the null pass": (
        "core/round.h", "is_guided(r, at) ? r.slot_real[kGuidance * r.slots + s] : 1.0f",
        "r.slot_real[kGuidance * r.slots + s]",
        "tests/test_round.cpp", "round", "guidance of lane 2",
    ),
    "lanes of the null pass in another order on a GPU": (
        "cuda/assign_lanes.h", "r.null_lane[tile.sum[c] - 1] = first + c;",
        "r.null_lane[sum_end - tile.sum[c]] = first + c;",
        "tests/test_cuda_rounds.cpp", "rounds", "lanes, seed",
    ),
    "padding that takes the null pass on a GPU": (
        "cuda/assign_lanes.h", "list_null_lanes(block, r, live, tile);", "list_null_lanes(block, r, r.widest, tile);",
        "tests/test_cuda_rounds.cpp", "rounds", "lanes, seed",
    ),
    "a null velocity that is read at guidance 1": (
        "core/step.h", "if (w == 1.0f) return read_u();", "",
        "cpu/simd_scalar.cpp", "simd", "load of null pointer",
    ),
    "a step without a score that raises the threshold": (
        "core/round.h", "if (scored) {", "{",
        "tests/test_round.cpp", "round", "of_score(kThreshold, b) == -1.0f",
    ),
    "a child taken though nobody scores it": (
        "core/round.h", "r.accept[at] && r.scored[at]", "r.accept[at]",
        "tests/test_round.cpp", "round", "r.advance[0] == kSpent",
    ),
    "a finished sample without a score": (
        "core/round.h", "r.finished[r.transition(b)] && is_scored(r, b)", "r.finished[r.transition(b)]",
        "tests/test_round.cpp", "round", "a finished sample of 0",
    ),
    "places kept on a GPU for lanes that come later": (
        "cuda/assign_lanes.h", "is_scored(r, b) == scored ? lanes_wanted(r, b) : 0", "lanes_wanted(r, b)",
        "tests/test_cuda_rounds.cpp", "rounds", "lanes, seed",
    ),
    "a finished sample on a GPU without a score": (
        "cuda/decide.h", "joins_samples(r, b) ? judge", "r.finished[r.transition(b)] ? judge",
        "tests/test_cuda_rounds.cpp", "rounds", "the books of round",
    ),
}  # fmt: skip


# Each compiles a file of the tests again, all together more than a minute; what they guard, the checks and the
# sanitizers, runs in every `make test`.
QUICK = ("a row that ends with its block", "a first round without the candidate", "a product of more than 63 bits")
PARAMS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in MUTANTS]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_mutant_still_applies(mutant):
    header, right, *_ = MUTANTS[mutant]
    assert (ROOT / "csrc" / header).read_text().count(right) == 1


@pytest.mark.parametrize("mutant", PARAMS)
def test_a_mutant_is_killed(build, tmp_path, mutant):
    header, right, wrong, source, part, said = MUTANTS[mutant]
    if "avx2" in source and "AVX" not in torch.backends.cpu.get_cpu_capability():
        pytest.skip("this processor has no AVX2 to run the mutant with")
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    text = (csrc / header).read_text()
    assert text.count(right) == 1
    (csrc / header).write_text(text.replace(right, wrong))

    objects = []
    for entry in json.loads((build / "compile_commands.json").read_text()):
        made = build / entry["output"]
        if entry["file"].endswith(f"csrc/{source}"):
            command = entry["command"].replace(str(ROOT / "csrc"), str(csrc))
            command = command.replace(entry["output"], str(tmp_path / "mutant.o"))
            subprocess.run(shlex.split(command), check=True, cwd=build)
            made = tmp_path / "mutant.o"
        objects.append(str(made))
    assert str(tmp_path / "mutant.o") in objects
    program = tmp_path / PROGRAM
    subprocess.run(["c++", "-fsanitize=address,undefined", *objects, "-o", str(program)], check=True)
    done = run(program, part)
    assert done.returncode != 0
    assert said in done.stdout + done.stderr, done.stdout + done.stderr
