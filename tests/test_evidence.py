"""The compiled kernels stay within the bounds of bench/evidence.py, and the bounds can be broken."""

import pytest

pytest.importorskip("triton", reason="compiling the kernels needs triton")

from dataclasses import replace

from triton.compiler.errors import CompilationError

from bench import evidence

# One target of each maker in `make test`; each is 20 s of compiling.
QUICK = ("sm_90", "gfx942")
TARGETS = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in evidence.TARGETS]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", evidence.CASES)
def test_kernels_stay_within_their_bounds(name, target):
    row, case = evidence.evidence(name, target), evidence.CASES[name]
    assert evidence.exceeded(row) == []
    for worse in ("spills", "shared", "barriers") if case.streams() else ("spills",):
        allowed = evidence.bounds().spills.get((name, target), 0) if worse == "spills" else getattr(row, worse)
        assert evidence.exceeded(replace(row, **{worse: allowed + 1}))
    if case.latents:
        assert evidence.exceeded(replace(row, store_bits=32)) and evidence.exceeded(
            replace(row, load_bits=32) if case.loads else replace(row, store_bits=16)
        )
    assert row.instructions is None or evidence.exceeded(replace(row, instructions=row.instructions + 1))


@pytest.mark.parametrize("name", evidence.CASES)
def test_kernels_compile_where_every_integer_is_1(name):
    """Triton makes a 1 a constant without a type, and then code that is right for a 2 may not compile."""
    evidence.compile_case(evidence.CASES[name], evidence.TARGETS["sm_90"], ones=True)


@pytest.mark.parametrize("name", ["normal_ bf16", "normalize_log_weights"])
def test_without_their_guard_these_would_not(name):
    with pytest.raises(CompilationError):
        evidence.compile_case(evidence.CASES[name], evidence.TARGETS["sm_90"], ones=True, guarded=False)


@pytest.mark.parametrize(
    ("version", "known"),
    [
        ("3.4.0", (3, 6)),
        ("3.6.0", (3, 6)),
        ("3.8.1", (3, 6)),
        ("3.9.0+git1", (3, 9)),
        ("3.10.0", (3, 9)),
        ("4.0", (3, 9)),
    ],
)
def test_bounds_are_those_of_the_version(version, known):
    assert evidence.bounds(version) is evidence.BOUNDS[known]


def test_a_copy_in_narrow_pieces_is_seen():
    """decide moves a chunk in six places, two accesses of 128 bits a thread each."""
    case, target = evidence.CASES["decide bf16"], evidence.TARGETS["sm_90"]
    assert evidence._copied(case, target, [128] * 12 + [64, 32, 8]) == 128
    assert evidence._copied(case, target, [128] * 11 + [64] * 2) == 64
    assert evidence._copied(case, target, [128] * 12 + [16]) == 16


LISTING = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/              @P0  BRA `(.L_x_2) ;
        /*0020*/                   STG.E.128 desc[UR4][R2.64], R4 ;
.L_x_2:
        /*0030*/                   FADD R0, R0, R0 ;
        /*0040*/              @P1  BRA `(.L_x_1) ;
        /*0050*/                   EXIT ;
"""


def test_instructions_are_counted_along_the_executed_path():
    """Three stores of 16 bytes are three turns of the loop, the branch around the store not taken."""
    path = evidence.executed(*evidence.parse_sass(LISTING), 48, {"STG.E.128": 16}, 0)
    assert path == {"S2R": 1, "BRA": 6, "STG.E.128": 3, "FADD": 3, "EXIT": 1}
    with pytest.raises(ValueError, match="no path stores 40 bytes"):
        evidence.executed(*evidence.parse_sass(LISTING), 40, {"STG.E.128": 16}, 0)
