"""The report: its arithmetic by hand, kernels that must fail it, and ours, which must not.

Kernels are compiled in a process of their own, since under TRITON_INTERPRET=1 there are none to compile.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from places import ROOT

pytest.importorskip("triton")
from fastmrcnn.kernels.common.launch import Launch
from fastmrcnn.kernels.report import (
    ARCHITECTURES,
    DEFAULT,
    Row,
    kernel_modules,
    occupancy,
    parse_sass,
    read_amd,
    specs_of,
    table,
)

SASS = """
 Resource usage:
  Function k:
  REG:148 STACK:24 SHARED:1024 LOCAL:0 CONSTANT[0]:712 TEXTURE:0 SURFACE:0 SAMPLER:0
        /*00f0*/                   LDG.E R0, desc[UR14][R2.64] ;
        /*0150*/                   LDG.E.U8 R5, desc[UR14][R4.64] ;
        /*0160*/                   LDG.E.U16.CONSTANT R5, desc[UR14][R4.64] ;
        /*0170*/              @!P0 LDG.E.EF.64 R4, desc[UR14][R4.64] ;
        /*12b0*/                   LDGSTS.E.BYPASS.128 [R101], desc[UR14][R26.64], P3 ;
        /*1840*/                   LDGDEPBAR ;
        /*1850*/                   LDS.128 R4, [R2] ;
        /*1860*/                   LDL.128 R4, [R1] ;
        /*19d0*/                   STG.E.128 desc[UR14][R28.64], R4 ;
        /*19e0*/                   STG.E desc[UR14][R28.64], R4 ;
"""

AMD = """
\tglobal_load_dwordx4 v[2:5], v[0:1], off
\tbuffer_load_dword v1, v2, s[0:3], 0 offen
\tglobal_load_ushort v1, v[2:3], off
\tglobal_load_short_d16_hi v1, v[2:3], off
\tbuffer_load_ubyte v1, v2, s[0:3], 0 offen
\tflat_load_dwordx2 v[2:3], v[0:1]
\tglobal_store_dwordx2 v[0:1], v[2:3], off
\tbuffer_store_byte v1, v2, s[0:3], 0 offen
\tds_read_b128 v[2:5], v0
\tscratch_load_dwordx4 v[2:5], off, s0
  - .agpr_count:     16
    .private_segment_fixed_size: 8
    .vgpr_count:     150
"""


def test_widths_spills_and_registers_of_sass() -> None:
    code = parse_sass(SASS)
    assert (code.registers, code.spilled) == (148, 24)
    assert code.loads == {4: 1, 1: 1, 2: 1, 8: 1, 16: 1}
    assert code.stores == {16: 1, 4: 1}


def test_widths_spills_and_registers_of_amd_assembly() -> None:
    code = read_amd(AMD)
    assert (code.registers, code.spilled) == (150, 8)
    assert code.loads == {16: 1, 4: 1, 2: 2, 1: 1, 8: 1}
    assert code.stores == {8: 1, 1: 1}
    with pytest.raises(ValueError, match=r"no \.vgpr_count"):
        read_amd("s_endpgm")


# Worked out by hand from the tables of the CUDA C++ Programming Guide.
@pytest.mark.parametrize(
    ("arch", "registers", "shared", "warps", "columns", "expected", "bound"),
    [
        ("sm_90", 32, 0, 8, 0, 1.0, "warps"),  # 64 warps of 32 * 32 registers fill the 65536
        ("sm_90", 33, 0, 8, 0, 0.75, "registers"),  # 33 -> 40 a lane: 12 warps a partition, 6 blocks
        ("sm_90", 255, 0, 8, 0, 0.125, "registers"),  # 256 a lane: 2 warps a partition, 1 block
        ("sm_90", 16, 0, 1, 0, 0.5, "blocks"),  # 32 blocks of one warp
        ("sm_90", 32, 106496, 8, 0, 0.25, "shared memory"),  # 2 * (104 + 1) KiB in 228
        ("sm_80", 32, 106496, 8, 0, 0.125, "shared memory"),  # one of (104 + 1) KiB in 164
        ("sm_86", 32, 106496, 8, 0, 0.0, "shared memory"),  # more than the 99 KiB of a block
        ("sm_100", 32, 0, 4, 256, 0.125, "tensor memory"),  # two halves of 512 columns
        ("gfx942", 150, 0, 4, 0, 0.375, "registers"),  # 152 of 512 a lane: 3 waves a SIMD
        ("gfx942", 24, 73728, 8, 0, 0.0, "shared memory"),  # more than 64 KiB
    ],
)
def test_occupancy(
    arch: str, registers: int, shared: int, warps: int, columns: int, expected: float, bound: str
) -> None:
    assert occupancy(ARCHITECTURES[arch], registers, shared, warps, columns) == (expected, bound)


def test_table_shows_failures_below_their_kernel() -> None:
    rows = [
        Row("a", "fp32", [], 8, 2_000_000, 0, 4, 40, 0, 1024, 16, 16, 8, 0.5, "registers", 90, 20, 1.0, 4.0),
        Row("b", "bf16", ["does not compile: no"], 8, 2_000_000, 3_000_000, 4),
    ]
    lines = table(rows).splitlines()
    assert [line.split()[0] for line in lines] == ["kernel", "a", "b", "FAILS:"]
    fields = ["a", "fp32", "4", "40", "0", "1024", "16", "8", "50%", "registers", "8", "2.00", "0.0"]
    fields += ["90", "20", "1.0", "4.0", "25%"]
    assert lines[1].split() == fields
    assert "does not compile: no" in lines[3]


# All of a block is needed for its sum, and then all of it again: one warp holds it in its registers.
PLANTED = """
import sys
import torch, triton, triton.language as tl
from fastmrcnn.kernels.common.launch import CompileSpec
from fastmrcnn.kernels.report import inspect_kernel

@triton.jit
def hoarding_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out_ptr + at, x * tl.sum(x))

@triton.jit
def strided_kernel(x_ptr, out_ptr, scale_ptr, stride, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    scale = tl.sum(tl.load(scale_ptr + tl.arange(0, 512)))  # one wide load beside many narrow ones
    tl.store(out_ptr + at, tl.load(x_ptr + at * stride) * scale)

hoard = {"x_ptr": torch.float32, "out_ptr": torch.float32}
stride = {"x_ptr": torch.bfloat16, "out_ptr": torch.bfloat16, "scale_ptr": torch.float32, "BLOCK": 4096}
specs = [
    CompileSpec("hoarding", "", hoarding_kernel, {**hoard, "BLOCK": int(sys.argv[2])}, 1, 0, 0, num_warps=1),
    CompileSpec("strided", "", strided_kernel, {**stride, "stride": 2}, 1, 0, 0, widest_load=16),
    CompileSpec("dense", "", strided_kernel, {**stride, "stride": 1}, 1, 0, 0, widest_load=16),
    CompileSpec("broken", "", strided_kernel, {**stride, "stride": 2, "BLOCK": 3}, 1, 0, 0),
]
for spec in specs:
    print(spec.name, *inspect_kernel(spec, sys.argv[1]).failures)
"""


def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**environment, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(("arch", "block"), [("sm_90", 8192), ("gfx942", 32768)])
def test_planted_kernels_fail(arch: str, block: int, tmp_path: Path) -> None:
    script = tmp_path / "planted.py"
    script.write_text(PLANTED)
    cache = str(tmp_path / "cache")
    done = run(str(script), arch, str(block), PYTHONPATH=str(ROOT), TRITON_CACHE_DIR=cache)
    assert done.returncode == 0, done.stderr
    found = {line.split()[0]: line.partition(" ")[2] for line in done.stdout.splitlines()}
    assert "spills" in found["hoarding"]
    assert found["strided"] == "loads 2 bytes a thread, 16 expected"
    assert found["dense"] == ""
    assert "does not compile" in found["broken"]


def report(path: Path, *archs: str) -> dict[str, list[dict[str, Any]]]:
    done = run("-m", "fastmrcnn.kernels.report", "--arch", *archs, "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(path.read_text())["architectures"]


def test_no_kernel_spills_and_features_load_wide(tmp_path: Path) -> None:
    rows = report(tmp_path / "report.json", "sm_90")["sm_90"]
    for row in rows:
        assert not row["failures"]
        assert row["spilled"] == 0
        assert 0 < row["occupancy"] <= 1
        assert row["least_bytes"] > 0
        assert row["instructions"] > 0
        if row["estimate_us"] is not None:  # never below the floor of its bytes
            assert row["estimate_us"] * 1.001 >= row["least_bytes"] / 3.35e6
    variants: dict[str, set[str]] = {}
    for row in rows:
        variants.setdefault(row["kernel"], set()).add(row["variant"])
    both = {f"{dtype} {layout}" for dtype in ("fp32", "bf16") for layout in ("nchw", "channels_last")}
    for size in ("7x7", "14x14"):
        for direction in ("forward", "backward"):
            flat = {f"{dtype} channels_last, nchw gradient" for dtype in ("fp32", "bf16")}
            expected = both | flat if direction == "backward" else both
            assert variants[f"roi_align {direction} {size}"] == expected
            main = [r for r in rows if r["kernel"] == f"roi_align {direction} {size}"]
            (fast,) = [r for r in main if r["variant"] == "bf16 channels_last"]
            assert fast["main_load"] == 16
            assert fast["occupancy"] == 2 * 8 / ARCHITECTURES["sm_90"].warps  # two programs, of 8 warps
    both_sets = [r for r in rows if r["kernel"] == "roi_align backward 7x7 and 14x14"]
    assert {r["variant"] for r in both_sets} == both
    (fast,) = [r for r in both_sets if r["variant"] == "bf16 channels_last"]
    assert (fast["main_load"], fast["occupancy"]) == (16, 2 * 8 / ARCHITECTURES["sm_90"].warps)
    assert "bf16 channels_last, packed" in variants["roi_align backward hits"]
    for direction in ("forward", "backward"):
        assert variants[f"mask_loss {direction}"] == both
    estimated = {row["kernel"] for row in rows if row["estimate_us"] is not None}
    assert estimated >= {"roi_align backward 7x7 and 14x14", "nms greedy", "matcher best of boxes"}
    assert estimated >= {"class_mask_loss 384", "assign_levels"}
    # 140 for two pairs of boxes where each was divided, about 80 where none is.
    (pairs,) = [r for r in rows if (r["kernel"], r["variant"]) == ("nms greedy", "groups")]
    assert pairs["loop_instructions"] <= 100
    assert any(kernel.startswith("nms") for kernel in variants)
    assert any(kernel.startswith("assign_levels") for kernel in variants)


@pytest.mark.slow
@pytest.mark.parametrize("arch", [*DEFAULT, "sm_86", "sm_89", "sm_120"])
def test_no_kernel_fails_on_any_architecture(arch: str, tmp_path: Path) -> None:
    rows = report(tmp_path / "report.json", arch)[arch]
    assert len(rows) == sum(len(specs_of(module, arch)) for module in kernel_modules())


POOL = """
import sys
from fastmrcnn.kernels.report import inspect_kernel, specs_of
from fastmrcnn.kernels.roi_align import kernel
for arch in sys.argv[1:]:
    for spec in specs_of(kernel, arch):
        if spec.variant == "bf16 channels_last" and spec.name.endswith("7x7"):
            row = inspect_kernel(spec, arch)
            print(arch, spec.name.split()[1], row.shared, row.occupancy, *row.failures)
"""


def test_devices_with_little_shared_memory_have_room(tmp_path: Path) -> None:
    """101,376 bytes for a program on sm_86. Of programs, which load ahead, two fit at once."""
    script = tmp_path / "pool.py"
    script.write_text(POOL)
    archs = ("sm_80", "sm_86")
    done = run(str(script), *archs, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert [row[:2] for row in rows] == [[arch, way] for arch in archs for way in ("forward", "backward")]
    for arch, _, shared, share, *failures in rows:
        assert not failures
        assert int(shared) <= ARCHITECTURES[arch].shared_of_block
        assert float(share) * ARCHITECTURES[arch].warps / 8 == 2


ONES = """
import torch
from fastmrcnn.kernels.level_assign import kernel as level_assign
from fastmrcnn.kernels.mask_loss import kernel as mask_loss
from fastmrcnn.kernels.mask_paste import kernel as mask_paste
from fastmrcnn.kernels.mask_rle import kernel as mask_rle
from fastmrcnn.kernels.nms import kernel as nms
from fastmrcnn.kernels.resize_pad import kernel as resize_pad
from fastmrcnn.kernels.roi_align import backward, forward
from fastmrcnn.kernels.common.pooling import Asked, Pooling

how = Pooling((1, 1), [1.0], 1, False, 224.0, 4, 4)
box, index = torch.empty(1, 4, device="meta"), torch.empty(1, dtype=torch.int64, device="meta")
feature = torch.empty(1, 1, 1, 1, device="meta")
kept = torch.empty(1, 1, dtype=torch.bool, device="meta")
pair = index.new_empty(1, 2)
_, loss, launches = mask_loss._forward(feature, index, feature[0], box[:, 0])
launches = [
    level_assign._launch(box, 2, 5, 224.0, 4)[1],
    *launches,
    mask_loss._backward(loss, loss, feature, index, feature[0], box[:, 0])[1],
    mask_paste._launch(feature[0], box, None, 1, 1, 0.5, False)[1],
    *mask_rle._launches(feature[0], box, None, None, 1, 1, 0.5, 1)[2],
    *nms._launches(box[None], box[None, :, 0], index[None], None, 0.5, index[None], kept, True),
    resize_pad._launch(kept[0].byte(), index, *[pair] * 3, index, pair.bool(), pair, None, 1, 1)[1],
    forward.launch([feature], box, index, None, how)[1],
    *backward.launches([feature], [Asked(box, index, None, how)], 1, [(1, 1)], False)[1],
]
for launch in launches:
    launch.spec("", "", 0, 0).compile()
    print(launch.kernel.__name__)
"""


def test_sizes_of_one_compile(tmp_path: Path) -> None:
    """Triton makes constants of them, with which not everything works that works with a variable."""
    script = tmp_path / "ones.py"
    script.write_text(ONES)
    done = run(str(script), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(set(done.stdout.split())) == 16


VARIANTS = """
import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from fastmrcnn.kernels.common.bitmaps import Bitmaps, Sampling
from fastmrcnn.kernels.common.pooling import Asked, Pooling
from fastmrcnn.kernels.level_assign import kernel as level_assign
from fastmrcnn.kernels.mask_paste import kernel as mask_paste
from fastmrcnn.kernels.mask_rle import kernel as mask_rle
from fastmrcnn.kernels.mask_targets import kernel as mask_targets
from fastmrcnn.kernels.matcher import kernel as matcher
from fastmrcnn.kernels.nms import kernel as nms
from fastmrcnn.kernels.resize_pad import kernel as resize_pad
from fastmrcnn.kernels.roi_align import backward, forward
from fastmrcnn.kernels.roi_max import backward as max_backward, forward as max_forward

backend = make_backend(GPUTarget("cuda", 90, 32))
variants = {}

def launched(launch):
    binder = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    options = {"num_warps": launch.num_warps, "debug": False, **launch.options}
    _, specialisation, _ = binder(**launch.arguments, **options)
    variants.setdefault(launch.kernel.__name__, set()).add(str(specialisation))

def new(*shape, dtype=torch.float32):
    return torch.empty(shape, dtype=dtype, device="meta")

for images in (1, 2, 16):
    for slots in (1, 7, 16, 1000, 1024):
        for objects in (1, 3, 16, 48):
            boxes, gt_boxes = new(images, slots, 4), new(images, objects, 4)
            valid = new(images, objects, dtype=torch.bool)
            launched(level_assign._launch(boxes, 2, 5, 224.0, 4)[1])
            found = matcher._outputs(boxes, valid, None, True)
            for launch in matcher._launches(boxes, gt_boxes, valid, None, 0.0, found):
                launched(launch)
            index = new(images, objects, dtype=torch.int64)
            for launch in nms._launches(boxes, boxes[..., 0], None, None, 0.5, index, index.bool(), True):
                launched(launch)

            sizes = [(slots, 4 * objects), (max(slots // 2, 1), 2 * objects), (1, 16 * images), (3, 1)]
            maps = [new(images, 256, *size).contiguous(memory_format=torch.channels_last) for size in sizes]
            rois, image = boxes.flatten(0, 1), new(images * slots, dtype=torch.int64)
            how = Pooling((7, 7), [1 / 4, 1 / 8, 1 / 16, 1 / 32], 0, True, 224.0, 4, 2)
            large = how._replace(output_size=(14, 14))
            out, launch = forward.launch(maps, rois, None, None, how)
            launched(launch)
            grads = [out, new(len(rois), 256, 14, 14).contiguous(memory_format=torch.channels_last)]
            asked = [Asked(rois, None, None, how), Asked(rois, image, None, large)]
            *_, launch = backward.launches(grads, asked, images, sizes, True)[1]
            launched(launch)
            for launch in backward.launches(grads[:1], asked[:1], images, sizes, True)[1][:2]:
                launched(launch)
            out, winner, launch = max_forward.launch(maps, rois, None, None, "pool", how)
            launched(launch)
            launched(max_backward.launch(out, winner, rois, None, None, images, sizes, True, "pool", how)[1])

            masks = new(slots, 28, 28)
            launched(mask_paste._launch(masks, boxes[0], None, 64 * objects, slots, 0.5, False)[1])
            for launch in mask_rle._launches(masks, boxes[0], None, None, objects, slots, 0.5, 7 * images)[2]:
                launched(launch)
            tables = Bitmaps(
                new(16 * slots + objects, dtype=torch.uint8),
                index, new(images, objects, 4, dtype=torch.int32), new(images, 2, 3),
                new(images, 2, dtype=torch.int32), new(images, 2, dtype=torch.int64),
            )
            sampling = Sampling((slots, 16 * objects), 28, 0, True, True)
            launched(mask_targets._launch(rois, image, image, None, tables, sampling)[1])

            pairs = [tables.size] * 3
            packed = (tables.buffer, new(images, dtype=torch.int64), *pairs, None, None, None, None)
            launched(resize_pad._launch(*packed, 7 * slots, 32 * objects)[1])
print({name: len(keys) for name, keys in variants.items()})
"""


def test_sizes_that_change_between_calls_compile_nothing_anew(tmp_path: Path) -> None:
    """Of 60 shapes, whether a size is 1 or divisible by 16 makes no difference, in tuples neither."""
    script = tmp_path / "variants.py"
    script.write_text(VARIANTS)
    done = run(str(script), PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-2000:]
    counts = ast.literal_eval(done.stdout)
    assert len(counts) == 19
    # Rows of bitmaps of a multiple of 16 bytes are stored 16 bytes at once; a row of one byte is the third.
    assert {name: count for name, count in counts.items() if count > 1} == {"_paste_kernel": 3}


class Recorder:
    """In the place of a kernel: keeps what it is launched with."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(**arguments: Any) -> None:
            self.grid, self.arguments = grid, arguments

        return launch


def test_what_is_compiled_is_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    """With its options, and on the device of its tensors."""
    tensor, devices = torch.zeros(3), []
    monkeypatch.setattr(torch.cuda, "device_of", lambda t: devices.append(t) or contextlib.nullcontext())
    options = {"enable_fp_fusion": False, "maxnreg": 128}
    launch = Launch(Recorder(), (2, 3), {"size": 3, "parts": (tensor, tensor)}, 8, options)
    launch.run()
    assert devices == [tensor]
    assert launch.kernel.grid == (2, 3)
    assert launch.kernel.arguments == {**launch.arguments, "num_warps": 8, **options}
    spec = launch.spec("name", "variant", 1, 2, 16)
    assert (spec.programs, spec.bytes, spec.flops, spec.widest_load) == (6, 1, 2, 16)
    assert (spec.num_warps, spec.options, spec.arguments) == (8, options, launch.arguments)


def test_greedy_nms_is_compiled_without_fusion() -> None:
    """As it is launched: fusion would round otherwise than torchvision."""
    specs = specs_of(importlib.import_module("fastmrcnn.kernels.nms.kernel"), "sm_90")
    greedy = [spec for spec in specs if spec.name == "nms greedy"]
    assert [spec.options["enable_fp_fusion"] for spec in greedy] == [False] * 3


def test_every_kernel_is_compiled() -> None:
    """A kernel that no spec names would never be looked at."""
    for module in kernel_modules():
        listed = {spec.kernel for spec in specs_of(module, "sm_90")}
        folder = Path(str(module.__file__)).parent
        siblings = [
            importlib.import_module(f"..{path.stem}", module.__name__) for path in folder.glob("*.py")
        ]
        written = {
            value
            for sibling in siblings
            for name, value in vars(sibling).items()
            if name.endswith("_kernel") and hasattr(value, "fn")
        }
        assert written
        assert written <= listed, f"{module.__name__} does not list all of its kernels"


def test_refuses_to_report_on_interpreted_kernels() -> None:
    done = run("-m", "fastmrcnn.kernels.report", "--arch", "sm_90", TRITON_INTERPRET="1")
    assert done.returncode == 2
    assert "TRITON_INTERPRET" in done.stderr
