"""FPN level assignment in Triton."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch
from .reference import first_threshold

BLOCK = 256


def assign_levels(
    boxes: Tensor, k_min: int, k_max: int, canonical_size: float, canonical_level: int
) -> Tensor:
    """See `reference.assign_levels`."""
    level, launch = _launch(boxes, k_min, k_max, canonical_size, canonical_level)
    if level.numel() > 0:
        launch.run()
    return level


def _launch(
    boxes: Tensor, k_min: int, k_max: int, canonical_size: float, canonical_level: int
) -> tuple[Tensor, Launch]:
    level = torch.empty(boxes.shape[:-1], dtype=torch.int32, device=boxes.device)
    rows = boxes.reshape(-1, 4)
    arguments = {
        "boxes_ptr": rows,
        "level_ptr": level,
        "stride_box": rows.stride(0),
        "stride_coordinate": rows.stride(1),
        "boxes": level.numel(),
        "LEVELS": k_max - k_min + 1,
        "AREA": first_threshold(k_min, canonical_size, canonical_level),
        "DTYPE": tl.float64 if boxes.dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
    }
    return level, Launch(_assign_levels_kernel, (triton.cdiv(level.numel(), BLOCK),), arguments)


def compile_specs() -> list[CompileSpec]:
    """8 images of 1000 boxes, 4 levels."""
    boxes = torch.empty((8, 1000, 4), device="meta")
    level, launch = _launch(boxes, 2, 5, 224.0, 4)
    return [launch.spec("assign_levels", "fp32", boxes.nbytes + level.nbytes, 6 * level.numel())]


@triton.jit(do_not_specialize=["boxes"])
def _assign_levels_kernel(
    boxes_ptr,  # (boxes, 4) xyxy
    level_ptr,  # (boxes,) int32, 0 for the finest
    stride_box, stride_coordinate,
    boxes,
    LEVELS: tl.constexpr,
    AREA: tl.constexpr,  # from which a box is on the second level
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = box < boxes
    at = boxes_ptr + box * stride_box
    step = tl.cast(stride_coordinate, tl.int64)
    x1 = tl.load(at, mask=exists, other=0.0).to(DTYPE)
    y1 = tl.load(at + step, mask=exists, other=0.0).to(DTYPE)
    x2 = tl.load(at + 2 * step, mask=exists, other=0.0).to(DTYPE)
    y2 = tl.load(at + 3 * step, mask=exists, other=0.0).to(DTYPE)
    area = (x2 - x1) * (y2 - y1)
    level = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(1, LEVELS):
        level += (area >= AREA * 4 ** (i - 1)).to(tl.int32)  # false where NaN
    tl.store(level_ptr + box, level, mask=exists)
