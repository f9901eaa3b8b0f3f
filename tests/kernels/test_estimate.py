"""The estimate of a launch's time: instructions by loop, and the formula by hand."""

from __future__ import annotations

import pytest

pytest.importorskip("triton")
from fastmrcnn.kernels.estimate import DEVICES, Device, Instructions, count_instructions, estimate
from fastmrcnn.kernels.report import ARCHITECTURES

LOOPS = """
        /*0000*/                   S2R R0, SR_TID.X ;
        /*0010*/                   IADD3 R1, R0, 0x1, RZ ;
        /*0020*/              @!P1 BRA 0x90 ;
        /*0030*/                   FMUL R2, R1, R1 ;
        /*0040*/                   FADD R3, R2, R1 ;
        /*0050*/               @P0 BRA 0x30 ;
        /*0060*/                   CALL.REL.NOINC 0xd0 ;
        /*0070*/                   FADD R3, R2, R1 ;
        /*0080*/               @P2 BRA 0x60 ;
        /*0090*/                   FMNMX R3, R2, R1, PT ;
        /*00a0*/               @P3 BRA 0x20 ;
        /*00b0*/                   STG.E desc[UR4][R4.64], R3 ;
        /*00c0*/                   EXIT ;
        /*00d0*/                   MUFU.RCP R5, R3 ;
        /*00e0*/               @P3 BRA 0xd0 ;
        /*00f0*/                   BRA 0xf0;
        /*0100*/                   NOP;
"""


def test_the_hot_loop_is_innermost_and_calls_nothing() -> None:
    """Of 3 instructions, where another of 3 calls a subroutine; 4 stand outside of the loop around both."""
    assert count_instructions(LOOPS) == Instructions(outside=4, loop=3)


def test_where_all_loops_call_the_largest_counts() -> None:
    sass = LOOPS.replace("@P0 BRA 0x30", "@P0 BRA 0x20").replace("FMUL R2, R1, R1", "CALL.REL.NOINC 0xd0")
    assert count_instructions(sass) == Instructions(outside=4, loop=4)


def test_code_without_loops() -> None:
    assert count_instructions("/*0000*/ EXIT ;\n/*0010*/ BRA 0x10;\n/*0020*/ NOP;\n") == Instructions(1, 0)


DEVICE = Device("made up", 10, 1e9, 100, 1e12)
LAUNCH = {"programs": 1000, "warps": 4, "bytes": 10_000_000, "flops": 4_000_000}


@pytest.mark.parametrize(
    ("trips", "resident", "expected"),
    [
        (10.0, 32, 120.0),  # 4000 warps of 200 + 100 * 10 instructions, 40 a nanosecond
        (10.0, 64, 120.0),  # a scheduler issues one a cycle, however many warps it has
        (10.0, 8, 480.0),  # 2 warps a scheduler, each every 8 cycles
        (0.0, 32, 20.0),
    ],
)
def test_by_hand(trips: float, resident: float, expected: float) -> None:
    found = estimate(DEVICE, Instructions(200, 100), trips, resident=resident, **LAUNCH)
    assert found is not None
    assert found.time * 1e6 == pytest.approx(expected)
    assert found.floor * 1e6 == pytest.approx(10)  # of the bytes; the operations take 2


def test_memory_bounds_from_below_and_what_is_not_known_is_not_told() -> None:
    few = estimate(DEVICE, Instructions(20, 0), None, resident=32, **LAUNCH)
    assert few is not None
    assert few.time == few.floor
    busy = estimate(DEVICE, Instructions(20, 0), None, resident=32, **{**LAUNCH, "flops": 40_000_000})
    assert busy is not None
    assert busy.floor * 1e6 == pytest.approx(20)
    assert estimate(DEVICE, Instructions(20, 5), None, resident=32, **LAUNCH) is None
    assert estimate(DEVICE, Instructions(20, 5), 3.0, resident=0, **LAUNCH) is None


def test_every_nvidia_architecture_has_a_device() -> None:
    assert set(DEVICES) == {arch for arch in ARCHITECTURES if arch.startswith("sm_")}
