"""How long a launch may take, from its machine code and its bytes: to judge a change without a GPU.

A warp's instructions are those outside of loops and, for each of the `trips` that the launch's
`CompileSpec` gives, those of the hot loop. That is the largest of the innermost loops that call nothing,
for what they call is the slow path of a division.

    issue     = programs * warps * instructions / (multiprocessors * 4 * clock * rate)
    rate      = min(1, warps that are resident on a scheduler / 8)
    floor     = max(least bytes / bandwidth, least operations / (multiprocessors * lanes * 2 * clock))
    estimate  = max(issue, least bytes / bandwidth)

A multiprocessor has four schedulers, each of which issues an instruction in a cycle. 8 cycles between two
instructions of a warp is an assumption: arithmetic takes 4 to 6, shared memory and barriers more. Left out
are what is read more than once, waiting for memory with few warps, uneven programs, and the launch itself
(about 3 microseconds). So an estimate compares two ways to write a kernel; it is no measurement.
"""

from __future__ import annotations

import re
from typing import NamedTuple

CYCLES_BETWEEN = 8  # two instructions of a warp
SCHEDULERS = 4


class Device(NamedTuple):
    """A card of an architecture, from its vendor's data sheet."""

    name: str
    multiprocessors: int
    clock: float  # Hz, boost
    lanes: int  # of float32, of a multiprocessor
    bandwidth: float  # bytes a second


DEVICES = {
    "sm_80": Device("A100 80GB SXM", 108, 1.41e9, 64, 2.039e12),
    "sm_86": Device("RTX 3090", 82, 1.695e9, 128, 0.936e12),
    "sm_89": Device("RTX 4090", 128, 2.52e9, 128, 1.008e12),
    "sm_90": Device("H100 SXM", 132, 1.98e9, 128, 3.35e12),
    "sm_100": Device("B200", 148, 1.965e9, 128, 8.0e12),
    "sm_120": Device("RTX 5090", 170, 2.407e9, 128, 1.792e12),
}


class Instructions(NamedTuple):
    """How many of a kernel's machine code."""

    outside: int  # of all loops
    loop: int  # in the hot loop; 0: there is no loop


def count_instructions(sass: str) -> Instructions:
    """Of the output of `cuobjdump -sass`. Subroutines, and padding, come last and are left out."""
    code = [(int(at, 16), text) for at, text in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+([^;]+);", sass)]
    jumps = [
        (int(found[2], 16), at, found[1])
        for at, text in code
        if (found := re.search(r"\b(BRA|CALL)\b.*0x([0-9a-f]+)", text))
    ]
    ends = [target for target, at, how in jumps if how == "CALL" or target == at]
    code = [(at, text) for at, text in code if at < min(ends, default=1 << 31)]
    loops = [(target, at) for target, at, how in jumps if target < at < min(ends, default=1 << 31)]
    innermost = [
        (begin, end)
        for begin, end in loops
        if not any(begin <= b and e <= end for b, e in loops if (b, e) != (begin, end))
    ]
    bodies = [[text for at, text in code if begin <= at <= end] for begin, end in innermost]
    quiet = [body for body in bodies if not any(re.search(r"\bCALL\b", text) for text in body)]
    hot = max(map(len, quiet or bodies), default=0)
    outside = sum(not any(begin <= at <= end for begin, end in loops) for at, _ in code)
    return Instructions(outside, hot)


class Estimate(NamedTuple):
    floor: float  # seconds
    time: float  # seconds


def estimate(
    device: Device,
    instructions: Instructions,
    trips: float | None,
    *,
    programs: int,
    warps: int,
    resident: float,
    bytes: int,
    flops: int,
) -> Estimate | None:
    """By the formula above; None where there are loops and nothing is known of them.

    Args:
        trips: of the hot loop, of the average program.
        resident: warps of a multiprocessor that run at once.
    """
    if trips is None and instructions.loop:
        return None
    of_warp = instructions.outside + instructions.loop * (trips or 0)
    moving = bytes / device.bandwidth
    computing = flops / (device.multiprocessors * device.lanes * 2 * device.clock)
    rate = min(1.0, resident / SCHEDULERS / CYCLES_BETWEEN)
    if rate == 0:  # it does not fit
        return None
    issue = programs * warps * of_warp / (device.multiprocessors * SCHEDULERS * device.clock * rate)
    return Estimate(max(moving, computing), max(moving, issue))
