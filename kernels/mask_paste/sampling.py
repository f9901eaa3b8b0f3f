"""Device functions that sample a mask at pixels, step by step as `cpu.py` does.

Compiled without fusion of products and sums, float32 has the bits of cpu.py.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_box(boxes_ptr, valid_ptr, slot, DTYPE: tl.constexpr):
    """Low corner and extent of a slot's box, as x, y, width, height, and whether there is anything in it."""
    x = tl.load(boxes_ptr + slot * 4).to(DTYPE)
    y = tl.load(boxes_ptr + slot * 4 + 1).to(DTYPE)
    width = tl.load(boxes_ptr + slot * 4 + 2).to(DTYPE) - x
    height = tl.load(boxes_ptr + slot * 4 + 3).to(DTYPE) - y
    # x - x is 0 for what is finite alone.
    real = (width - width == 0) & (height - height == 0) & (width > 0) & (height > 0)
    if valid_ptr is not None:
        real = real & (tl.load(valid_ptr + slot) != 0)
    x = tl.where(real, x, 0.0).to(DTYPE)
    y = tl.where(real, y, 0.0).to(DTYPE)
    width = tl.where(real, width, 1.0).to(DTYPE)
    height = tl.where(real, height, 1.0).to(DTYPE)
    return x, y, width, height, real


@triton.jit
def position(pixel, low, extent, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Of pixels' centres along an axis of the mask with its rim, 0 to SIDE + 1. It rises with the pixel."""
    offset = pixel.to(DTYPE) + 0.5 - low
    share = offset / extent if offset.dtype == tl.float64 else tl.div_rn(offset, offset * 0.0 + extent)
    return tl.minimum(tl.maximum(share * SIDE + 0.5, 0.0), SIDE + 1.0)


@triton.jit
def touches(first, last, low, extent, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Whether any of the pixels first to last can see more than the rim; scalars."""
    begins = position(last, low, extent, SIDE, DTYPE) > 0
    return begins & (position(first, low, extent, SIDE, DTYPE) < SIDE + 1)


@triton.jit
def sample(masks_ptr, slot, y, x, real, SIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Values at the positions y and x, which are of one shape or broadcast to one."""
    row, column = tl.minimum(tl.floor(y), SIDE * 1.0), tl.minimum(tl.floor(x), SIDE * 1.0)
    down, right = y - row, x - column
    # In the mask without its rim.
    row, column = row.to(tl.int32) - 1, column.to(tl.int32) - 1
    at = masks_ptr + slot * SIDE * SIDE + row * SIDE + column
    upper, lower = (row >= 0) & real, (row + 1 < SIDE) & real
    first, second = column >= 0, column + 1 < SIDE
    a = tl.load(at, mask=upper & first, other=0.0).to(DTYPE)
    b = tl.load(at + 1, mask=upper & second, other=0.0).to(DTYPE)
    c = tl.load(at + SIDE, mask=lower & first, other=0.0).to(DTYPE)
    d = tl.load(at + SIDE + 1, mask=lower & second, other=0.0).to(DTYPE)
    a += down * (c - a)
    b += down * (d - b)
    return a + right * (b - a)
