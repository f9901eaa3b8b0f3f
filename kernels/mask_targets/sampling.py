"""Device functions that read the ground truth under mask pixels, where `cpu.py` reads it.

Sums of the four neighbours are of another order than there, and rounded otherwise.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def target_pixels(
    rois,  # boxes (F, 4), image (F,), matched (F,), valid (F,) uint8 or None
    bitmaps,  # buffer (B,), offset (N, G), window (N, G, 4), affine (N, 2, 3), size (N, 2), image size (N, 2)
    limits,  # B, N, G, height and width of the input, coded
    slot,
    pixel,  # (P,) int32, row by row
    mask,  # (P,)
    SIDE: tl.constexpr,  # of the mask
    SAMPLES: tl.constexpr,  # of a mask pixel and axis; 0: adaptive
    ALIGNED: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """(P,) share of each mask pixel that is covered. Only what lies within the tables is read."""
    buffer_size, images, objects = limits[0] >> 2, limits[1] >> 2, limits[2] >> 2
    input_height, input_width = limits[3] >> 2, limits[4] >> 2
    boxes_ptr, image_ptr, matched_ptr, valid_ptr = rois
    buffer_ptr, offset_ptr, window_ptr, affine_ptr, size_ptr, image_size_ptr = bitmaps
    x1 = tl.load(boxes_ptr + slot * 4).to(DTYPE)
    y1 = tl.load(boxes_ptr + slot * 4 + 1).to(DTYPE)
    x2 = tl.load(boxes_ptr + slot * 4 + 2).to(DTYPE)
    y2 = tl.load(boxes_ptr + slot * 4 + 3).to(DTYPE)
    image = tl.load(image_ptr + slot).to(tl.int64)
    matched = tl.load(matched_ptr + slot).to(tl.int64)
    # x - x is NaN for NaN and for infinity.
    real = (x1 - x1 == 0) & (y1 - y1 == 0) & (x2 - x2 == 0) & (y2 - y2 == 0)
    real = real & (image >= 0) & (image < images) & (matched >= 0) & (matched < objects)
    if valid_ptr is not None:
        real = real & (tl.load(valid_ptr + slot) != 0)
    x1 = tl.where(real, x1, 0.0).to(DTYPE)
    y1 = tl.where(real, y1, 0.0).to(DTYPE)
    x2 = tl.where(real, x2, 0.0).to(DTYPE)
    y2 = tl.where(real, y2, 0.0).to(DTYPE)

    row = image * objects + matched
    crop = (
        buffer_ptr,
        buffer_size,
        tl.load(offset_ptr + row, mask=real, other=0).to(tl.int64),
        tl.load(window_ptr + row * 4, mask=real, other=0).to(tl.int32),
        tl.load(window_ptr + row * 4 + 1, mask=real, other=0).to(tl.int32),
        tl.load(window_ptr + row * 4 + 2, mask=real, other=0).to(tl.int32),
        tl.load(window_ptr + row * 4 + 3, mask=real, other=0).to(tl.int32),
    )
    affine = (
        tl.load(affine_ptr + image * 6, mask=real, other=0.0).to(DTYPE),
        tl.load(affine_ptr + image * 6 + 1, mask=real, other=0.0).to(DTYPE),
        tl.load(affine_ptr + image * 6 + 2, mask=real, other=0.0).to(DTYPE),
        tl.load(affine_ptr + image * 6 + 3, mask=real, other=0.0).to(DTYPE),
        tl.load(affine_ptr + image * 6 + 4, mask=real, other=0.0).to(DTYPE),
        tl.load(affine_ptr + image * 6 + 5, mask=real, other=0.0).to(DTYPE),
    )
    sizes_ptr = image_size_ptr if SAMPLES == 0 else size_ptr
    height = tl.load(sizes_ptr + image * 2, mask=real, other=0).to(tl.int32)
    width = tl.load(sizes_ptr + image * 2 + 1, mask=real, other=0).to(tl.int32)

    start_x, side_x, count_x = _axis(x1, x2, input_width, SIDE, SAMPLES, ALIGNED, DTYPE)
    start_y, side_y, count_y = _axis(y1, y2, input_height, SIDE, SAMPLES, ALIGNED, DTYPE)
    step_x = _divide(side_x, count_x)
    step_y = _divide(side_y, count_y)
    bin_x = start_x + (pixel % SIDE).to(DTYPE) * side_x
    bin_y = start_y + (pixel // SIDE).to(DTYPE) * side_y
    total = tl.zeros(pixel.shape, DTYPE)
    if SAMPLES == 0:
        for i in range(_loops(count_y, input_height, real, SIDE)):
            for j in range(_loops(count_x, input_width, real, SIDE)):
                y, x = bin_y + (i + 0.5) * step_y, bin_x + (j + 0.5) * step_x
                total += _in_the_input(crop, affine, x, y, height, width, input_height, input_width, mask)
    else:
        mask = mask & (pixel < tl.where(real, SIDE * SIDE, 0))
        for i in range(SAMPLES):
            for j in range(SAMPLES):
                y, x = bin_y + (i + 0.5) * step_y, bin_x + (j + 0.5) * step_x
                total += _in_the_annotation(crop, affine, x, y, height, width, mask)
    return _divide(total, (total * 0.0 + count_x * count_y).to(DTYPE))


@triton.jit
def _axis(
    low, high, length, SIDE: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, DTYPE: tl.constexpr
):
    """Start of the grid in pixel indices, side of a mask pixel, and samples in it."""
    extent = high - low
    if ALIGNED:
        start = low - 0.5
    else:
        start = low
        extent = tl.maximum(extent, 1.0)
    side = _divide(extent, (extent * 0.0 + SIDE).to(DTYPE))
    count = tl.maximum(tl.ceil(side), 1.0) if SAMPLES == 0 else side * 0.0 + SAMPLES
    return start, side, count.to(DTYPE)


@triton.jit
def _loops(count, length, real, SIDE: tl.constexpr):
    """Adaptive samples to read: no more than a box within the image has, however large the box is."""
    most = (length + SIDE - 1) // SIDE + 1
    return tl.where(real, tl.where(count < most, count, most).to(tl.int32), 0)


@triton.jit
def _divide(x, y):
    """IEEE division: ceil(side / bins) must not see 2.0000002 where cpu.py sees 2."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def _in_the_annotation(crop, affine, x, y, height, width, mask):
    """Bilinear read at input positions, which are pixel indices, in the annotation's resolution."""
    u, v = _annotation_position(affine, x + 0.5, y + 0.5)
    u -= 0.5
    v -= 0.5
    inside = mask & (u >= -1) & (u <= width) & (v >= -1) & (v <= height)
    u0, u1, du = _neighbours(u, width)
    v0, v1, dv = _neighbours(v, height)
    top = _read(crop, u0, v0, inside, u.dtype) * (1 - du) + _read(crop, u1, v0, inside, u.dtype) * du
    bottom = _read(crop, u0, v1, inside, u.dtype) * (1 - du) + _read(crop, u1, v1, inside, u.dtype) * du
    return tl.where(inside, top * (1 - dv) + bottom * dv, 0.0)


@triton.jit
def _in_the_input(crop, affine, x, y, height, width, input_height, input_width, mask):
    """Bilinear read in the input's resolution, of which each pixel is the annotation's at its centre."""
    inside = mask & (x >= -1) & (x <= width) & (y >= -1) & (y <= height)
    x0, x1, dx = _neighbours(x, tl.minimum(width, input_width))
    y0, y1, dy = _neighbours(y, tl.minimum(height, input_height))
    top = _nearest(crop, affine, x0, y0, inside, x.dtype) * (1 - dx)
    top += _nearest(crop, affine, x1, y0, inside, x.dtype) * dx
    bottom = _nearest(crop, affine, x0, y1, inside, x.dtype) * (1 - dx)
    bottom += _nearest(crop, affine, x1, y1, inside, x.dtype) * dx
    return tl.where(inside, top * (1 - dy) + bottom * dy, 0.0)


@triton.jit
def _nearest(crop, affine, column, row, mask, DTYPE: tl.constexpr):
    u, v = _annotation_position(affine, column.to(DTYPE) + 0.5, row.to(DTYPE) + 0.5)
    return _read(crop, tl.floor(u).to(tl.int32), tl.floor(v).to(tl.int32), mask, DTYPE)


@triton.jit
def _annotation_position(affine, x, y):
    """Continuous annotation coordinates of continuous input coordinates."""
    a, b, c, d, e, f = affine
    return a * x + b * y + c, d * x + e * y + f


@triton.jit
def _neighbours(position, size):
    """The two pixels about an index position, clamped to 0..size-1, and the second one's weight."""
    last = tl.maximum(size - 1, 0)
    position = tl.minimum(tl.maximum(position, 0.0), last.to(position.dtype))
    low = tl.floor(position)
    index = low.to(tl.int32)
    return index, tl.minimum(index + 1, last), position - low


@triton.jit
def _read(crop, column, row, mask, DTYPE: tl.constexpr):
    """Bytes at annotation pixels; zero outside the crop, where the bitmap is zero too."""
    buffer_ptr, buffer_size, offset, left, top, width, height = crop
    column -= left
    row -= top
    inside = mask & (column >= 0) & (column < width) & (row >= 0) & (row < height)
    address = offset + row.to(tl.int64) * width + column
    inside = inside & (address >= 0) & (address < buffer_size)
    return tl.load(buffer_ptr + address, mask=inside, other=0).to(DTYPE)
