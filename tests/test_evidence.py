"""The compiled step kernel stays within the bounds of bench/evidence.py, and the bounds can be broken."""

import pytest

pytest.importorskip("triton", reason="compiling the kernels needs triton")

from dataclasses import replace

from bench import evidence


@pytest.mark.parametrize("target", evidence.TARGETS)
@pytest.mark.parametrize("name", evidence.CASES)
def test_kernels_stay_within_their_bounds(name, target):
    row = evidence.evidence(name, target)
    assert evidence.exceeded(row) == []
    for worse in ("spills", "shared", "barriers"):
        assert evidence.exceeded(replace(row, **{worse: getattr(row, worse) + 1}))
    assert evidence.exceeded(replace(row, store_bits=32)) and evidence.exceeded(
        replace(row, load_bits=32) if evidence.CASES[name].loads else replace(row, store_bits=16)
    )
    assert row.instructions is None or evidence.exceeded(replace(row, instructions=row.instructions + 1))


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
