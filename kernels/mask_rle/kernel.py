"""Run lengths of pasted masks in Triton, straight from masks and boxes.

An *edge* is a pixel that differs from the one before it, down the columns and from left to right; before
the first there are zeros. Only the columns and rows that the box covers can have one. A first pass counts
the edges of each column, a second finds them again and writes each to its place, which is the number of
edges before it, and a third turns edges into lengths.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch, plain
from ..common.library import interpreting
from ..mask_paste.cpu import sample_dtype
from ..mask_paste.kernel import TRITON_DTYPE
from ..mask_paste.sampling import load_box, position, sample

COLUMNS, ROWS = 8, 64  # of a program, and of those rows that it takes at once
BLOCK = 1024  # runs of a program of the last pass


def mask_rle(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `op.mask_rle`, whose arguments they are."""
    runs, count, launches = _launches(*arguments)
    if count.numel():
        for launch in launches:
            launch.run()
    return runs, count


def _launches(
    masks: Tensor,
    boxes: Tensor,
    sizes: Tensor | None,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    max_runs: int,
) -> tuple[Tensor, Tensor, list[Launch]]:
    slots, side = masks.shape[:2]
    edges_of_column = torch.empty((slots, width), dtype=torch.int32, device=masks.device)
    ends = torch.empty((slots, max_runs), dtype=torch.int32, device=masks.device)
    runs = torch.empty_like(ends)
    count = torch.empty((slots,), dtype=torch.int32, device=masks.device)
    where: dict[str, Any] = {
        "boxes_ptr": plain(boxes),
        "sizes_ptr": None if sizes is None else plain(sizes),
        "valid_ptr": None if valid is None else plain(valid),
        "height": height,
        "width": width,
        "SIDE": side,
        "DTYPE": TRITON_DTYPE[sample_dtype(masks, boxes)],
    }
    scan: dict[str, Any] = {
        "masks_ptr": plain(masks),
        "edges_of_column_ptr": edges_of_column,
        "THRESHOLD": threshold,
        "COLUMNS": 8 * COLUMNS if interpreting() else COLUMNS,
        "ROWS": ROWS,
    }
    columns = (slots, triton.cdiv(width, scan["COLUMNS"]))
    write = {"ends_ptr": ends, "max_runs": max_runs, "BLOCK": BLOCK}
    finish = {"edges_of_column_ptr": edges_of_column, "runs_ptr": runs, "count_ptr": count}
    # Without fusion the rounding of every step is that of mask_paste's cpu.py.
    options = {"enable_fp_fusion": False}
    launches = [
        Launch(_count_kernel, columns, {**where, **scan}, options=options),
        Launch(_ends_kernel, columns, {**where, **scan, **write}, options=options),
        Launch(
            _lengths_kernel, (slots, triton.cdiv(max_runs, BLOCK)), {**where, **finish, **write},
            options=options,
        ),
    ]  # fmt: skip
    return runs, count, launches


def compile_specs() -> list[CompileSpec]:
    """100 detections of 28x28 at 800x1344, with room for 4096 runs each; in bf16 with a size for each.

    The least bytes are what each pass reads and writes where every column of the image has edges. The least
    operations are the three interpolations of a pixel and its comparison, where every pixel sees its mask.
    """
    slots, side, height, width, max_runs = 100, 28, 800, 1344, 4096
    specs = []
    for dtype, name in ((torch.float32, "fp32"), (torch.bfloat16, "bf16")):
        masks = torch.empty((slots, side, side), dtype=dtype, device="meta")
        boxes = torch.empty((slots, 4), device="meta")
        sizes = None if name == "fp32" else torch.empty((slots, 2), dtype=torch.int64, device="meta")
        valid = torch.empty((slots,), dtype=torch.bool, device="meta")
        runs, count, launches = _launches(masks, boxes, sizes, valid, height, width, 0.5, max_runs)
        columns = 4 * slots * width
        moved = (
            masks.nbytes + columns,
            masks.nbytes + columns + runs.nbytes,
            columns + 2 * runs.nbytes + count.nbytes,
        )
        work = 10 * slots * height * width
        for launch, step, size, flops in zip(
            launches, ("count", "ends", "lengths"), moved, (work, work, 0), strict=True
        ):
            specs.append(launch.spec(f"mask_rle {step}", name, size + boxes.nbytes, flops))
    return specs


@triton.jit
def _window(boxes_ptr, sizes_ptr, valid_ptr, height, width, slot, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """A slot's box, the size of its image, and left, right, top and bottom of what its bitmap can cover."""
    if sizes_ptr is not None:
        height = tl.minimum(tl.maximum(tl.load(sizes_ptr + slot * 2), 0), height).to(tl.int32)
        width = tl.minimum(tl.maximum(tl.load(sizes_ptr + slot * 2 + 1), 0), width).to(tl.int32)
    x, y, extent_x, extent_y, real = load_box(boxes_ptr, valid_ptr, slot, DTYPE)
    left, right = _covered(x, extent_x, width, real, SIDE)
    top, bottom = _covered(y, extent_y, height, real, SIDE)
    return (x, y, extent_x, extent_y), height, width, left, right, top, bottom


@triton.jit
def _covered(low, extent, size, real, SIDE: tl.constexpr):
    """First pixel of an axis and one past the last: half a cell beyond the box, and more than rounding."""
    rim = extent * (0.5001 / SIDE) + 1.0
    first = tl.minimum(tl.maximum(low - rim, 0.0), size * 1.0)
    last = tl.minimum(tl.maximum(low + extent + rim, 0.0), size * 1.0)
    first, last = tl.floor(first).to(tl.int32), tl.ceil(last).to(tl.int32)
    return first, tl.where(real, tl.maximum(first, last), first)


@triton.jit
def _edges(
    masks_ptr, slot, box, height, width, left, right, top, bottom, column, row,
    SIDE: tl.constexpr, THRESHOLD: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """(COLUMNS, ROWS) int32, 1 where the pixel in line differs from the one before it.

    Rows are top to bottom, both included. Row `height` of a column is row 0 of the next one, and counts here
    unless that column is looked at from row 0 itself.
    """
    low_x, low_y, extent_x, extent_y = box
    x = position(column, low_x, extent_x, SIDE, DTYPE)
    y = position(row, low_y, extent_y, SIDE, DTYPE)
    above = position(row - 1, low_y, extent_y, SIDE, DTYPE)
    threshold = tl.full((), THRESHOLD, DTYPE)

    inside = (column < right)[:, None] & (row <= bottom)[None, :]
    inside = inside & ((column[:, None] < width - 1) | (row[None, :] < height))  # not behind the last pixel
    again = (column[:, None] < right - 1) & (row[None, :] == height)
    inside = inside & ((top > 0) | (again == 0))
    within = inside & (row < height)[None, :]
    below = inside & (row > 0)[None, :]
    bit = sample(masks_ptr, slot, y[None, :], x[:, None], within, SIDE, DTYPE) >= threshold
    before = sample(masks_ptr, slot, above[None, :], x[:, None], below, SIDE, DTYPE) >= threshold
    # The pixel before row 0 is the last one of the column before. Behind the last row covered, `bit` is 0.
    end = position(column * 0 + height - 1, low_y, extent_y, SIDE, DTYPE)
    x = position(column - 1, low_x, extent_x, SIDE, DTYPE)
    tail = sample(masks_ptr, slot, end, x, (column > left) & (column < right), SIDE, DTYPE) >= threshold
    tail = tl.where((row == 0)[None, :], tail.to(tl.int32)[:, None], before.to(tl.int32))
    return tl.where(inside & (bit.to(tl.int32) != tail), 1, 0)


@triton.jit
def _edges_before(edges_of_column_ptr, slot, width, left, column, BLOCK: tl.constexpr):
    """How many edges the columns left of `column` have."""
    total = tl.zeros((BLOCK,), tl.int32)
    for first in range(left, column, BLOCK):
        place = first + tl.arange(0, BLOCK)
        total += tl.load(edges_of_column_ptr + slot * width + place, mask=place < column, other=0)
    return tl.sum(total, axis=0)


@triton.jit(do_not_specialize=["height", "width"])
def _count_kernel(
    masks_ptr,  # (D, SIDE, SIDE) floating point
    boxes_ptr,  # (D, 4) floating point xyxy
    sizes_ptr,  # (D, 2) integer or None
    valid_ptr,  # (D,) uint8 or None
    edges_of_column_ptr,  # (D, width) int32, written in the columns that the box covers
    height,
    width,
    SIDE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    box, own_height, own_width, left, right, top, bottom = _window(
        boxes_ptr, sizes_ptr, valid_ptr, height, width, slot, SIDE, DTYPE
    )
    first = left + tl.program_id(1) * COLUMNS
    if first < right:
        column = first + tl.arange(0, COLUMNS)
        count = tl.zeros((COLUMNS,), tl.int32)
        for start in range(top, bottom + 1, ROWS):
            row = start + tl.arange(0, ROWS)
            edges = _edges(
                masks_ptr, slot, box, own_height, own_width, left, right, top, bottom, column, row,
                SIDE, THRESHOLD, DTYPE,
            )  # fmt: skip
            count += tl.sum(edges, axis=1)
        tl.store(edges_of_column_ptr + slot * width + column, count, mask=column < right)


@triton.jit(do_not_specialize=["height", "width", "max_runs"])
def _ends_kernel(
    masks_ptr,  # as in `_count_kernel`
    boxes_ptr,
    sizes_ptr,
    valid_ptr,
    edges_of_column_ptr,  # (D, width) int32
    ends_ptr,  # (D, max_runs) int32, written up to the number of edges; where the pixel of an edge is in line
    height,
    width,
    max_runs,
    SIDE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    DTYPE: tl.constexpr,
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    box, own_height, own_width, left, right, top, bottom = _window(
        boxes_ptr, sizes_ptr, valid_ptr, height, width, slot, SIDE, DTYPE
    )
    first = left + tl.program_id(1) * COLUMNS
    if first < right:
        column = first + tl.arange(0, COLUMNS)
        counted = tl.load(edges_of_column_ptr + slot * width + column, mask=column < right, other=0)
        before = _edges_before(edges_of_column_ptr, slot, width, left, first, BLOCK)
        before += tl.cumsum(counted, axis=0) - counted
        for start in range(top, bottom + 1, ROWS):
            row = start + tl.arange(0, ROWS)
            edges = _edges(
                masks_ptr, slot, box, own_height, own_width, left, right, top, bottom, column, row,
                SIDE, THRESHOLD, DTYPE,
            )  # fmt: skip
            place = before[:, None] + tl.cumsum(edges, axis=1) - edges
            end = column[:, None] * own_height + row[None, :]
            tl.store(ends_ptr + slot * max_runs + place, end, mask=(edges != 0) & (place < max_runs))
            before += tl.sum(edges, axis=1)


@triton.jit(do_not_specialize=["height", "width", "max_runs"])
def _lengths_kernel(
    boxes_ptr,  # as in `_count_kernel`
    sizes_ptr,
    valid_ptr,
    edges_of_column_ptr,  # (D, width) int32
    ends_ptr,  # (D, max_runs) int32
    runs_ptr,  # (D, max_runs) int32, written
    count_ptr,  # (D,) int32, written
    height,
    width,
    max_runs,
    SIDE: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    _, own_height, own_width, left, right, _, _ = _window(
        boxes_ptr, sizes_ptr, valid_ptr, height, width, slot, SIDE, DTYPE
    )
    edges = _edges_before(edges_of_column_ptr, slot, width, left, right, BLOCK)
    run = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    at = slot * max_runs + run
    begin = tl.load(ends_ptr + at - 1, mask=(run > 0) & (run <= edges) & (run < max_runs), other=0)
    end = tl.load(ends_ptr + at, mask=(run < edges) & (run < max_runs), other=0)
    # The last run ends with the image.
    end = tl.where(run == edges, own_height * own_width, end)
    tl.store(runs_ptr + at, tl.where(run <= edges, end - begin, 0), mask=run < max_runs)
    if tl.program_id(1) == 0:
        tl.store(count_ptr + slot, edges + 1)
