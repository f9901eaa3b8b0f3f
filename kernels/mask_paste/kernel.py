"""Mask paste in Triton: one program for each tile of each bitmap, which is written once.

A tile that sees nothing of its mask is filled with zeros and reads nothing but the box.
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
from .cpu import packed_width, sample_dtype
from .sampling import load_box, position, sample, touches

TILE_H, TILE_W = 64, 128  # of a program, in pixels
ROWS = 16  # of a tile, sampled at once
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


def paste_masks(*arguments: Any) -> Tensor:
    """See `op.paste_masks`, whose arguments they are."""
    out, launch = _launch(*arguments)
    if out.numel():
        launch.run()
    return out


def _launch(
    masks: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    packed: bool,
) -> tuple[Tensor, Launch]:
    columns = packed_width(width) if packed else width
    slots = masks.shape[0]
    dtype = torch.uint8 if packed else torch.bool
    out = torch.empty((slots, height, columns), dtype=dtype, device=masks.device)
    arguments = {
        "masks_ptr": plain(masks),
        "boxes_ptr": plain(boxes),
        "valid_ptr": None if valid is None else plain(valid),
        "out_ptr": plain(out),
        "height": height,
        "width": width,
        "columns": columns,
        "SIDE": masks.shape[1],
        "THRESHOLD": threshold,
        "PACKED": packed,
        "DTYPE": TRITON_DTYPE[sample_dtype(masks, boxes)],
        "TILE_H": TILE_H,
        "TILE_W": TILE_W,
        "ROWS": TILE_H if interpreting() else ROWS,
    }
    grid = (slots, triton.cdiv(height, TILE_H), triton.cdiv(width, TILE_W))
    # Without fusion the rounding of every step is that of cpu.py.
    return out, Launch(_paste_kernel, grid, arguments, options={"enable_fp_fusion": False})


def compile_specs() -> list[CompileSpec]:
    """100 detections of 28x28 at 800x1344, and at a width that no vector divides.

    The least bytes are the masks, the boxes and the bitmaps. The least operations are the three
    interpolations of a pixel and its comparison, where every pixel sees its mask.
    """
    slots, side = 100, 28
    specs = []
    for dtype, name, width, packed in (
        (torch.float32, "fp32 bools", 1344, False),
        (torch.float32, "fp32 bools", 1333, False),
        (torch.float32, "fp32 bits", 1344, True),
        (torch.bfloat16, "bf16 bools", 1344, False),
    ):
        masks = torch.empty((slots, side, side), dtype=dtype, device="meta")
        boxes = torch.empty((slots, 4), device="meta")
        valid = torch.empty((slots,), dtype=torch.bool, device="meta")
        out, launch = _launch(masks, boxes, valid, 800, width, 0.5, packed)
        moved = masks.nbytes + boxes.nbytes + slots + out.nbytes
        specs.append(launch.spec(f"mask_paste {width} wide", name, moved, 10 * slots * 800 * width))
    return specs


# Whether a row is a multiple of 16 bytes is specialised on: then they are stored 16 at once.
@triton.jit(do_not_specialize=["height", "width"])
def _paste_kernel(
    masks_ptr,  # (D, SIDE, SIDE) floating point
    boxes_ptr,  # (D, 4) floating point xyxy
    valid_ptr,  # (D,) uint8 or None
    out_ptr,  # (D, height, columns) uint8, written
    height,
    width,
    columns,  # bytes of a row of the output
    SIDE: tl.constexpr,
    THRESHOLD: tl.constexpr,
    PACKED: tl.constexpr,
    DTYPE: tl.constexpr,
    TILE_H: tl.constexpr,
    TILE_W: tl.constexpr,
    ROWS: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    top, left = tl.program_id(1) * TILE_H, tl.program_id(2) * TILE_W
    low_x, low_y, extent_x, extent_y, real = load_box(boxes_ptr, valid_ptr, slot, DTYPE)
    real = real & touches(left, left + TILE_W - 1, low_x, extent_x, SIDE, DTYPE)
    column = left + tl.arange(0, TILE_W)
    x = position(column, low_x, extent_x, SIDE, DTYPE)
    threshold = tl.full((), THRESHOLD, DTYPE)
    for first in range(0, TILE_H, ROWS):
        row = top + first + tl.arange(0, ROWS)
        bits = tl.zeros((ROWS, TILE_W), tl.uint8)
        if real & touches(top + first, top + first + ROWS - 1, low_y, extent_y, SIDE, DTYPE):
            y = position(row, low_y, extent_y, SIDE, DTYPE)
            inside = column[None, :] < width
            value = sample(masks_ptr, slot, y[:, None], x[None, :], inside, SIDE, DTYPE)
            bits = ((value >= threshold) & inside).to(tl.uint8)
        if PACKED:
            place = tl.full((8,), 128, tl.int32) >> tl.arange(0, 8)
            bits = tl.reshape(bits.to(tl.int32), (ROWS, TILE_W // 8, 8)) * place[None, None, :]
            byte = left // 8 + tl.arange(0, TILE_W // 8)
            at = (slot * height + row[:, None]) * columns + byte[None, :]
            inside = (row[:, None] < height) & (byte[None, :] < columns)
            tl.store(out_ptr + at, tl.sum(bits, axis=2).to(tl.uint8), mask=inside)
        else:
            at = (slot * height + row[:, None]) * columns + column[None, :]
            tl.store(out_ptr + at, bits, mask=(row[:, None] < height) & (column[None, :] < columns))
