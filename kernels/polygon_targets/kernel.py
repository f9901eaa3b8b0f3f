"""Polygons rasterised on the grid of each RoI, in Triton. The rule, and its names, are those of `cpu`.

A program makes 32 x 32 pixels of one mask. It walks over the parts of the object, some edges at a time;
what an edge toggles in a column is a word of 32 bits, one for each row, so that odd and even is an
exclusive or over edges, and the union over parts an or.
"""

# mypy: allow-untyped-defs
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch
from ..common.library import interpreting
from .cpu import MIN_SIDE, SCALE

ROWS = 32  # bits of a word
COLUMNS = 32
EDGES = 16


def polygon_mask_targets(*arguments: Any) -> Tensor:
    """See `op.polygon_mask_targets`, whose arguments they are."""
    inside, launch = _launch(*arguments)
    if inside.numel():
        launch.run()
    return inside


def _launch(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,  # a loop needs no bound
    resolution: int,
) -> tuple[Tensor, Launch]:
    inside = boxes.new_empty((boxes.shape[0], resolution, resolution), dtype=torch.bool)
    # The interpreter reduces one element at a time.
    columns, edges = (8, 8) if interpreting() else (COLUMNS, EDGES)
    arguments = {
        "boxes_ptr": boxes.contiguous(),
        "image_ptr": image.contiguous(),
        "matched_ptr": matched.contiguous(),
        "vertices_ptr": vertices.contiguous(),
        "part_start_ptr": part_start.contiguous(),
        "first_part_ptr": first_part.contiguous(),
        "parts_ptr": parts.contiguous(),
        "to_input_ptr": to_input.contiguous(),
        "inside_ptr": inside.view(torch.uint8),
        "images": first_part.shape[0],
        "slots": first_part.shape[1],
        "num_vertices": vertices.shape[0],
        "num_parts": part_start.shape[0] - 1,
        "RESOLUTION": resolution,
        "MIN_SIDE": MIN_SIDE,
        "SCALE": SCALE,
        "ROWS": ROWS,
        "COLUMNS": columns,
        "EDGES": edges,
    }
    grid = (boxes.shape[0], triton.cdiv(resolution, ROWS), triton.cdiv(resolution, columns))
    # without fused multiply-add, which would round less often than pycocotools does
    return inside, Launch(_rasterise_kernel, grid, arguments, options={"enable_fp_fusion": False})


def compile_specs() -> list[CompileSpec]:
    """512 boxes about objects of 50 vertices in 2 parts, 16 images of 16 slots."""
    boxes, images, slots, each = 512, 16, 16, 50

    def meta(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    specs = []
    for resolution in (28, 56):
        inputs = (
            meta(boxes, 4, dtype=torch.float32),
            meta(boxes, dtype=torch.int64),
            meta(boxes, dtype=torch.int64),
            meta(images * slots * each, 2, dtype=torch.float64),
            meta(images * slots * 2 + 1, dtype=torch.int32),
            meta(images, slots, dtype=torch.int32),
            meta(images, slots, dtype=torch.int32),
            meta(images, 2, 3, dtype=torch.float64),
            meta(0, dtype=torch.int64),
        )
        inside, launch = _launch(*inputs, resolution)
        moved = inside.nbytes + sum(tensor.nbytes for tensor in inputs)
        # transforming each vertex; a product, a sum and two comparisons for each edge and column
        operations = boxes * each * (14 + resolution * 4)
        size = f"{resolution}x{resolution}"
        specs.append(launch.spec(f"polygon_mask_targets {size}", "fp64", moved, operations))
    return specs


@triton.jit(do_not_specialize=["images", "slots", "num_vertices", "num_parts"])
def _rasterise_kernel(
    boxes_ptr,  # (T, 4) fp32 xyxy
    image_ptr,  # (T,) int
    matched_ptr,  # (T,) int
    vertices_ptr,  # (num_vertices, 2) fp64
    part_start_ptr,  # (num_parts + 1,) int32
    first_part_ptr,  # (images, slots) int32
    parts_ptr,  # (images, slots) int32
    to_input_ptr,  # (images, 2, 3) fp64
    inside_ptr,  # (T, RESOLUTION, RESOLUTION) uint8
    images,
    slots,
    num_vertices,
    num_parts,
    RESOLUTION: tl.constexpr,
    MIN_SIDE: tl.constexpr,
    SCALE: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    EDGES: tl.constexpr,
):
    box = tl.program_id(0).to(tl.int64)
    first_row = tl.program_id(1) * ROWS
    column = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    x1, y1 = tl.load(boxes_ptr + box * 4), tl.load(boxes_ptr + box * 4 + 1)
    x2, y2 = tl.load(boxes_ptr + box * 4 + 2), tl.load(boxes_ptr + box * 4 + 3)
    finite = (tl.abs(x1) < float("inf")) & (tl.abs(y1) < float("inf"))
    finite = finite & (tl.abs(x2) < float("inf")) & (tl.abs(y2) < float("inf"))
    image = tl.load(image_ptr + box).to(tl.int64)
    matched = tl.load(matched_ptr + box).to(tl.int64)
    known = finite & (image >= 0) & (image < images) & (matched >= 0) & (matched < slots)
    slot = image * slots + matched
    first = tl.load(first_part_ptr + slot, mask=known, other=0)
    last = first + tl.load(parts_ptr + slot, mask=known, other=0)
    first, last = tl.maximum(first, 0), tl.minimum(last, num_parts)

    affine_ptr = to_input_ptr + image * 6
    ax = tl.load(affine_ptr, mask=known, other=0.0)
    bx = tl.load(affine_ptr + 1, mask=known, other=0.0)
    cx = tl.load(affine_ptr + 2, mask=known, other=0.0)
    ay = tl.load(affine_ptr + 3, mask=known, other=0.0)
    by = tl.load(affine_ptr + 4, mask=known, other=0.0)
    cy = tl.load(affine_ptr + 5, mask=known, other=0.0)
    ratio_x = _ratio(x1, x2, RESOLUTION, MIN_SIDE)
    ratio_y = _ratio(y1, y2, RESOLUTION, MIN_SIDE)
    left, top = x1.to(tl.float64), y1.to(tl.float64)

    border = (column * SCALE + (SCALE + 1) // 2).to(tl.float64)[None, :]
    inside = tl.zeros((COLUMNS,), tl.int32)
    part = first
    while part < last:
        begin = tl.maximum(tl.load(part_start_ptr + part), 0)
        end = tl.minimum(tl.load(part_start_ptr + part + 1), num_vertices)
        odd = tl.zeros((COLUMNS,), tl.int32)
        low = begin
        while low < end:
            here = low + tl.arange(0, EDGES)
            real = here < end
            there = tl.where(here + 1 < end, here + 1, begin)
            xa, ya = _position(vertices_ptr, here, real, ax, bx, cx, ay, by, cy)
            xb, yb = _position(vertices_ptr, there, real, ax, bx, cx, ay, by, cy)
            xa, xb = _fine(xa, left, ratio_x, SCALE), _fine(xb, left, ratio_x, SCALE)
            ya, yb = _fine(ya, top, ratio_y, SCALE), _fine(yb, top, ratio_y, SCALE)
            flat = tl.abs(xa - xb) >= tl.abs(ya - yb)
            swap = tl.where(flat, xa > xb, ya > yb)
            x, y = tl.where(swap, xb, xa), tl.where(swap, yb, ya)
            dx, dy = tl.where(swap, xa, xb) - x, tl.where(swap, ya, yb) - y
            long, short = tl.where(flat, dx, dy), tl.where(flat, dy, dx)
            slope = (short / tl.where(long > 0, long, 1.0))[:, None]  # 0 where there is no edge
            run = (long / tl.where(short != 0, short, 1.0))[:, None]
            flat, x, y, end_x = flat[:, None], x[:, None], y[:, None], (x + dx)[:, None]
            crosses = ((x < border) != (end_x < border)) & real[:, None]

            fine = tl.minimum(y + slope * (border - 1 - x) + 0.5, y + slope * (border - x) + 0.5)
            near = tl.floor((border - 0.5 - x) * run + 0.5)
            reached = x + slope * near + 0.5 >= border
            steep = y + near - (reached == (slope > 0)).to(tl.float64)
            fine = tl.where(crosses, tl.where(flat, tl.floor(fine), steep), 0.0)
            fine = tl.minimum(tl.maximum(fine, 0.0), SCALE * RESOLUTION * 1.0)
            row = (fine.to(tl.int32) + SCALE // 2) // SCALE - first_row
            word = tl.where(row < ROWS, -1 << tl.minimum(tl.maximum(row, 0), ROWS - 1), 0)
            odd ^= tl.xor_sum(tl.where(crosses, word, 0), axis=0)
            low += EDGES
        inside |= odd
        part += 1

    bit = tl.arange(0, ROWS)
    row = first_row + bit
    at = inside_ptr + box * (RESOLUTION * RESOLUTION) + row[:, None] * RESOLUTION + column[None, :]
    value = ((inside[None, :] >> bit[:, None]) & 1).to(tl.uint8)
    tl.store(at, value, mask=(row < RESOLUTION)[:, None] & (column < RESOLUTION)[None, :])


@triton.jit
def _ratio(low, high, RESOLUTION: tl.constexpr, MIN_SIDE: tl.constexpr):
    """Mask pixels per input pixel, rounded to fp32 and then fp64."""
    side = tl.maximum(high - low, MIN_SIDE).to(tl.float64)
    # A quotient of fp32 numbers, rounded to fp64 and then to fp32, is the one rounded at once.
    return (tl.full((), RESOLUTION, tl.float64) / side).to(tl.float32).to(tl.float64)


@triton.jit
def _position(vertices_ptr, index, real, ax, bx, cx, ay, by, cy):
    """Vertices in input pixels."""
    at = vertices_ptr + index.to(tl.int64) * 2
    x = tl.load(at, mask=real, other=0.0)
    y = tl.load(at + 1, mask=real, other=0.0)
    return ax * x + bx * y + cx, ay * x + by * y + cy


@triton.jit
def _fine(position, corner, ratio, SCALE: tl.constexpr):
    """Whole numbers on the fine grid, rounded as a cast of x + 0.5 to int rounds."""
    x = (position - corner) * ratio * SCALE + 0.5
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
