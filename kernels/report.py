"""What the kernels become on a GPU, found out without one.

    python -m fastmrcnn.kernels.report [--arch sm_80 sm_90 sm_100 gfx942] [--json FILE]

Compiles every kernel that the `compile_specs()` of the operators list, reads the machine code, and prints
registers, spilled bytes, shared memory, the widest global load and store of a thread, the occupancy that
follows, and the least bytes and operations that the launch must move and do, with the time that these take
and an estimate of its own (`estimate.py` has the formula). Exits with 1 if a kernel does not compile, does
not fit, spills, or loads its features in narrower pieces than it should.

Load widths: NVIDIA, LDG, LDGSTS and STG in the disassembly (the CUDA tools in the triton package); AMD,
global_, buffer_ and flat_ instructions in the assembly. Limits of occupancy: CUDA C++ Programming Guide,
"Compute Capabilities"; AMD CDNA 3 ISA guide, "Kernel state"; LLVM's AMDGPU usage guide.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import math
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
import triton

from .common.launch import CompileSpec, Target
from .common.library import interpreting
from .estimate import DEVICES, Instructions, count_instructions, estimate


class Limits(NamedTuple):
    """Of one multiprocessor (a compute unit, on AMD), and how its resources are dealt out."""

    warps: int
    blocks: int
    registers: int  # of 32 bits and one lane, over all warps that run at once
    register_unit: int  # a warp gets a multiple of this many a lane
    partitions: int  # schedulers, each with its share of registers and warps
    shared: int  # bytes
    shared_of_block: int  # most that one block may have
    shared_reserved: int  # taken by the system for each block
    shared_unit: int
    tensor_columns: int = 0  # of the tensor memory


def _nvidia(warps: int, blocks: int, kibibytes: int, tensor_columns: int = 0) -> Limits:
    shared = kibibytes * 1024
    return Limits(warps, blocks, 2048, 8, 4, shared, shared - 1024, 1024, 128, tensor_columns)


ARCHITECTURES = {
    "sm_80": _nvidia(64, 32, 164),
    "sm_86": _nvidia(48, 16, 100),
    "sm_89": _nvidia(48, 24, 100),
    "sm_90": _nvidia(64, 32, 228),
    "sm_100": _nvidia(64, 32, 228, tensor_columns=512),
    "sm_120": _nvidia(48, 24, 100),
    "gfx90a": Limits(32, 16, 2048, 8, 4, 64 * 1024, 64 * 1024, 0, 512),
    "gfx942": Limits(32, 16, 2048, 8, 4, 64 * 1024, 64 * 1024, 0, 512),
}
DEFAULT = ("sm_80", "sm_90", "sm_100", "gfx942")


@dataclass
class Code:
    """What the machine code of a kernel says of itself. Loads and stores: how many of each width in bytes."""

    registers: int
    spilled: int
    loads: Counter[int] = field(default_factory=Counter)
    stores: Counter[int] = field(default_factory=Counter)
    instructions: Instructions | None = None  # None: not counted


@dataclass
class Row:
    """One kernel on one architecture. Bytes; widths are those of a thread."""

    kernel: str
    variant: str
    failures: list[str]
    programs: int
    least_bytes: int
    least_flops: int
    warps: int
    registers: int | None = None
    spilled: int | None = None
    shared: int | None = None
    widest_load: int | None = None
    main_load: int | None = None  # the width that most bytes of the loads in the code have
    widest_store: int | None = None
    occupancy: float | None = None  # warps that fit, over warps that the multiprocessor can hold
    bound: str | None = None  # what keeps more blocks out
    instructions: int | None = None  # outside of loops
    loop_instructions: int | None = None  # in the hot loop
    floor_us: float | None = None  # of the least bytes and operations, on the device that `estimate.py` names
    estimate_us: float | None = None


def kernel_modules() -> list[ModuleType]:
    """The `kernel.py` of each operator."""
    folders = sorted(path.parent.name for path in Path(__file__).parent.glob("*/kernel.py"))
    return [importlib.import_module(f".{name}.kernel", __package__) for name in folders]


def specs_of(module: ModuleType, arch: str) -> list[CompileSpec]:
    """What a module launches on an architecture. One whose launches depend on it takes a `Target`."""
    if not inspect.signature(module.compile_specs).parameters:
        return module.compile_specs()
    limits = ARCHITECTURES[arch]
    return module.compile_specs(Target(_backend(arch), limits.shared_of_block, limits.tensor_columns > 0))


def inspect_kernel(spec: CompileSpec, arch: str) -> Row:
    """Compile for an architecture and read the machine code."""
    return _row(spec, arch, _compile(spec, arch))


def report(arch: str) -> list[Row]:
    """Every kernel on one architecture. Triton compiles one while the CUDA tools disassemble others."""
    specs = [spec for module in kernel_modules() for spec in specs_of(module, arch)]
    with ThreadPoolExecutor() as pool:
        rows = [pool.submit(_row, spec, arch, _compile(spec, arch)) for spec in specs]
        return [row.result() for row in rows]


def _backend(arch: str) -> str:
    return "hip" if arch.startswith("gfx") else "cuda"


def _compile(spec: CompileSpec, arch: str) -> Any:
    """The compiled kernel, or what went wrong."""
    try:
        if _backend(arch) == "hip":
            return spec.compile("hip", arch, 64)
        return spec.compile("cuda", int(arch[3:]), 32)
    except Exception as error:  # whatever a compiler says of a kernel is a finding of the report
        return error


def _row(spec: CompileSpec, arch: str, compiled: Any) -> Row:
    row = Row(spec.name, spec.variant, [], spec.programs, spec.bytes, spec.flops, spec.num_warps)
    if isinstance(compiled, Exception):
        row.failures = [f"does not compile: {(str(compiled).strip() or repr(compiled)).splitlines()[-1]}"]
        return row
    amd = _backend(arch) == "hip"
    code = read_amd(compiled.asm["amdgcn"]) if amd else read_nvidia(compiled.asm["cubin"])
    row.registers, row.spilled, row.shared = code.registers, code.spilled, compiled.metadata.shared
    row.widest_load = max(code.loads, default=None)
    row.widest_store = max(code.stores, default=None)
    if code.loads:
        row.main_load = max(code.loads, key=lambda width: (width * code.loads[width], width))
    columns = getattr(compiled.metadata, "tmem_size", None) or 0
    row.occupancy, row.bound = occupancy(
        ARCHITECTURES[arch], code.registers, compiled.metadata.shared, spec.num_warps, columns
    )
    if code.instructions is not None and arch in DEVICES:
        row.instructions, row.loop_instructions = code.instructions
        found = estimate(
            DEVICES[arch],
            code.instructions,
            spec.trips,
            programs=spec.programs,
            warps=spec.num_warps,
            resident=row.occupancy * ARCHITECTURES[arch].warps,
            bytes=spec.bytes,
            flops=spec.flops,
        )
        if found is not None:
            row.floor_us, row.estimate_us = found.floor * 1e6, found.time * 1e6
    if row.occupancy == 0:
        row.failures.append(f"does not fit: too much {row.bound}")
    if code.spilled:
        row.failures.append(f"spills {code.spilled} bytes")
    if spec.widest_load is not None and (row.main_load or 0) < spec.widest_load:
        row.failures.append(f"loads {row.main_load or 0} bytes a thread, {spec.widest_load} expected")
    return row


def read_nvidia(cubin: bytes) -> Code:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        tool = triton.knobs.nvidia.cuobjdump.path
        dumped = subprocess.run(
            [tool, "-res-usage", "-sass", str(path)], check=True, capture_output=True, text=True
        )
    return parse_sass(dumped.stdout)


def parse_sass(text: str) -> Code:
    """Of the output of `cuobjdump -res-usage -sass`."""
    usage = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text))
    code = Code(int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]))
    code.instructions = count_instructions(text)
    for name, modifiers in re.findall(r"\b(LDG|LDGSTS|STG)((?:\.\w+)+)", text):
        width = 4
        for part in modifiers.split(".")[1:]:
            if part in ("64", "128", "256"):
                width = int(part) // 8
            elif part in ("U8", "S8"):
                width = 1
            elif part in ("U16", "S16"):
                width = 2
        (code.stores if name == "STG" else code.loads)[width] += 1
    return code


_AMD_WIDTHS = {"byte": 1, "short": 2, "dword": 4, "dwordx2": 8, "dwordx3": 12, "dwordx4": 16}


def read_amd(text: str) -> Code:
    """Of assembly with its metadata. Registers are vector registers, accumulation registers among them."""

    def number(key: str) -> int:
        found = re.search(rf"^\s*\.{key}:\s+(\d+)", text, re.MULTILINE)
        if found is None:
            raise ValueError(f"the assembly has no .{key}")
        return int(found[1])

    code = Code(number("vgpr_count"), number("private_segment_fixed_size"))
    memory = r"^\s+(?:global|buffer|flat)_(load|store)_(?:lds_)?[us]?(byte|short|dword(?:x[234])?)(?:_|\b)"
    for direction, kind in re.findall(memory, text, re.MULTILINE):
        (code.loads if direction == "load" else code.stores)[_AMD_WIDTHS[kind]] += 1
    return code


def occupancy(limits: Limits, registers: int, shared: int, warps: int, columns: int = 0) -> tuple[float, str]:
    """Share of a multiprocessor's warps that can run at once, and the limit that binds.

    Args:
        registers: of one lane.
        shared: bytes of one block.
        warps: of one block.
        columns: of tensor memory, of one block.
    """

    def round_up(value: int, unit: int) -> int:
        return math.ceil(value / unit) * unit

    lane = max(round_up(registers, limits.register_unit), limits.register_unit)
    warps_of_partition = limits.registers // limits.partitions // lane
    block_shared = round_up(shared + limits.shared_reserved, limits.shared_unit)
    blocks = {
        "warps": limits.warps // warps,
        "blocks": limits.blocks,
        # A block's warps are dealt to the partitions in turn.
        "registers": warps_of_partition * limits.partitions // round_up(warps, limits.partitions)
        if warps >= limits.partitions
        else warps_of_partition * limits.partitions // warps,
    }
    if block_shared:
        blocks["shared memory"] = limits.shared // block_shared if shared <= limits.shared_of_block else 0
    if columns:
        blocks["tensor memory"] = limits.tensor_columns // columns
    bound = min(blocks, key=lambda name: blocks[name])
    return blocks[bound] * warps / limits.warps, bound


def table(rows: Sequence[Row]) -> str:
    """A line for each kernel, and below it what is wrong with it."""
    head = ["kernel", "", "warps", "registers", "spilled B", "shared B", "load B", "store B", "occupancy"]
    head += [
        "bound by",
        "programs",
        "least MB",
        "least MFLOP",
        "code",
        "loop",
        "floor us",
        "estimate us",
        "share",
    ]
    lines = [head]
    for row in rows:
        share = None if row.occupancy is None else f"{100 * row.occupancy:.0f}%"
        cells = [row.kernel, row.variant, row.warps, row.registers, row.spilled, row.shared, row.widest_load]
        cells += [row.widest_store, share, row.bound, row.programs]
        cells += [f"{row.least_bytes / 1e6:.2f}", f"{row.least_flops / 1e6:.1f}"]
        cells += [row.instructions, row.loop_instructions]
        if row.floor_us is None or row.estimate_us is None:
            cells += [None, None, None]
        else:
            of_floor = f"{100 * row.floor_us / row.estimate_us:.0f}%"
            cells += [f"{row.floor_us:.1f}", f"{row.estimate_us:.1f}", of_floor]
        lines.append(["-" if cell is None else str(cell) for cell in cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    text = []
    for index, line in enumerate(lines):
        padded = [
            cell.ljust(width) if i in (0, 1, 9) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        text.append("  ".join(padded).rstrip())
        if index:
            text += [f"    FAILS: {failure}" for failure in rows[index - 1].failures]
    return "\n".join(text)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog=f"python -m {__package__}.report",
        description="Compile every kernel without a GPU, and tell registers, spills, widths and occupancy.",
    )
    parser.add_argument("--arch", nargs="+", choices=list(ARCHITECTURES), default=list(DEFAULT))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything there too")
    args = parser.parse_args(argv)
    if interpreting():
        parser.error("TRITON_INTERPRET=1 is set, so that nothing is compiled: unset it")

    found: dict[str, Any] = {"torch": torch.__version__, "triton": triton.__version__, "architectures": {}}
    failures = 0
    for arch in args.arch:
        rows = report(arch)
        failures += sum(bool(row.failures) for row in rows)
        found["architectures"][arch] = [asdict(row) for row in rows]
        print(f"{arch}, triton {triton.__version__}\n{table(rows)}\n", flush=True)
    print(f"{failures} failed" if failures else "no kernel spills; every feature load is as wide as asked")
    if args.json is not None:
        args.json.write_text(json.dumps(found, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
