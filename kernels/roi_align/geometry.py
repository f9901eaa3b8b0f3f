"""Device functions of the RoIAlign kernels: where an RoI lies, and what its bins weigh.

They take one RoI as scalars or a block of them, and follow `cpu.py` step by step.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def select(values, level, first):
    """values[level], for a level that is known on the device only; `first` is values[0] in its shape."""
    chosen = first
    for i in tl.static_range(1, len(values)):
        chosen = tl.where(level == i, values[i], chosen)
    return chosen


@triton.jit
def size_of(codes, level):
    """Of a level, from what `coded` makes of the sizes of all."""
    return select(codes, level, level * 0 + codes[0]) >> 2


@triton.jit
def axis(low, high, scale, BINS: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr):
    """Start, length of a bin, distance of its samples, and samples per bin, in pixels of the level."""
    if ALIGNED:
        start = low * scale - 0.5
        side = high * scale - 0.5 - start
    else:
        start = low * scale
        side = tl.maximum(high * scale - start, 1.0)
    length = _divide(side, (side * 0.0 + BINS).to(side.dtype))
    samples = samples_of(length, SAMPLES)
    return start, length, _divide(length, tl.maximum(samples, 1.0).to(length.dtype)), samples


@triton.jit
def samples_of(length, SAMPLES: tl.constexpr):
    """Samples per bin and axis."""
    return (tl.ceil(length) if SAMPLES == 0 else length * 0.0 + SAMPLES).to(length.dtype)


@triton.jit
def _divide(x, y):
    """IEEE division: ceil(side / bins) must not see 2.0000002 where cpu.py sees 2."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)


@triton.jit
def load_boxes(
    boxes_ptr, batch_ptr, valid_ptr, roi, exists,
    stride_roi, stride_coordinate, stride_batch, rois_per_image, num_images,
    HAS_BATCH: tl.constexpr, HAS_VALID: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Corners, image, and whether there is something to pool. Works on one RoI or on a block of them."""
    at = boxes_ptr + roi.to(tl.int64) * stride_roi
    step = tl.cast(stride_coordinate, tl.int64)
    x1 = tl.load(at, mask=exists, other=0.0).to(DTYPE)
    y1 = tl.load(at + step, mask=exists, other=0.0).to(DTYPE)
    x2 = tl.load(at + 2 * step, mask=exists, other=0.0).to(DTYPE)
    y2 = tl.load(at + 3 * step, mask=exists, other=0.0).to(DTYPE)
    # x - x is NaN for NaN and for infinity.
    real = exists & (x1 - x1 == 0) & (y1 - y1 == 0) & (x2 - x2 == 0) & (y2 - y2 == 0)
    if HAS_BATCH:
        given = tl.load(batch_ptr + roi.to(tl.int64) * stride_batch, mask=exists, other=0)
        if not given.dtype.is_floating():
            given = given.to(tl.int64)  # what a narrow one is compared with may be beyond it
        real = real & (given >= 0) & (given < num_images)
        image = tl.where(real, given, 0).to(tl.int32)
    else:
        image = roi // rois_per_image
    if HAS_VALID:
        real = real & (tl.load(valid_ptr + roi, mask=exists, other=0) != 0)
    return (
        tl.where(real, x1, 0.0).to(DTYPE), tl.where(real, y1, 0.0).to(DTYPE),
        tl.where(real, x2, 0.0).to(DTYPE), tl.where(real, y2, 0.0).to(DTYPE), image, real,
    )  # fmt: skip


@triton.jit
def level_of(x1, y1, x2, y2, LEVELS: tl.constexpr, AREA: tl.constexpr):
    """FPN's rule, as in level_assign: AREA is where the second level begins."""
    area = (x2 - x1) * (y2 - y1)
    level = (area * 0.0).to(tl.int32)
    for i in tl.static_range(1, LEVELS):
        level += (area >= AREA * 4 ** (i - 1)).to(tl.int32)
    return level


@triton.jit
def scale_of(level, like, SCALES: tl.constexpr):
    scale = like * 0.0 + SCALES[0]
    for i in tl.static_range(1, len(SCALES)):
        scale = tl.where(level == i, SCALES[i], scale).to(like.dtype)
    return scale.to(like.dtype)


@triton.jit
def touched(start, length, step, samples, size, first_bin, last_bin):
    """First and last line that samples of these bins touch; the last is before the first if none do."""
    one = start + first_bin * length + 0.5 * step
    other = start + last_bin * length + (samples - 0.5) * step
    low = tl.minimum(one, other)
    high = tl.maximum(one, other)
    border = (size - 1).to(length.dtype)
    touches = (samples >= 1) & (high >= -1) & (low <= size)
    first = tl.floor(tl.minimum(tl.maximum(low, 0.0), border)).to(tl.int32)
    last = tl.floor(tl.minimum(tl.maximum(high, 0.0), border)).to(tl.int32) + 1
    return tl.where(touches, first, 0), tl.where(touches, tl.minimum(last, size - 1), -1)


@triton.jit
def weights(line, bins, start, length, step, size, SAMPLES: tl.constexpr, SLOTS: tl.constexpr):
    """Weight of each line (a row or column of pixels) in each bin; `line` and `bins` broadcast, in 2D.

    Adaptive samples lie more than half a pixel apart, so that at most four touch a line: of SLOTS samples
    from the first on that can, none is missed. Where rounding takes the first to be one too early, the
    last of the four lies a rounding away from where its weight is 0. Samples are summed as an axis, not in
    a loop, since the compiler would repeat elementwise work in the layout of the whole matrix of weights.
    """
    samples = samples_of(length, SAMPLES)
    begin = (start + bins.to(length.dtype) * length)[:, :, None]
    at = line.to(length.dtype)[:, :, None]
    slot = tl.arange(0, SLOTS)[None, None, :]
    first = tl.maximum(tl.ceil((at - 1 - begin) * (1.0 / step) - 0.5), 0.0) if SAMPLES == 0 else 0.0
    sample = first + slot
    position = begin + (sample + 0.5) * step
    exists = (position >= -1) & (position <= size) & (sample < samples)
    position = tl.minimum(tl.maximum(position, 0.0), (size - 1).to(length.dtype))
    hat = tl.where(exists, tl.maximum(1 - tl.abs(at - position), 0.0), 0.0)
    return tl.sum(hat, axis=2) * (1.0 / samples)


@triton.jit
def tile_of(index, heights, widths, first_tiles, TILE: tl.constexpr):
    """Level of a tile, height and width of its map, image, and the tile's first row and column.

    Heights and widths of the levels are coded, and so are `first_tiles`, the index of the first tile of
    each: those of the coarsest come first.
    """
    level = index * 0
    for coarser in tl.static_range(1, len(heights)):
        level = tl.where(index < first_tiles[coarser - 1] >> 2, coarser, level)
    height = size_of(heights, level)
    width = size_of(widths, level)
    local = index - size_of(first_tiles, level)
    columns = (width + TILE - 1) // TILE
    tiles = (height + TILE - 1) // TILE * columns
    y0 = local % tiles // columns * TILE
    x0 = local % tiles % columns * TILE
    return level, height, width, local // tiles, y0, x0


@triton.jit
def bins_of(item, OH: tl.constexpr, OW: tl.constexpr, PART_H: tl.constexpr, PART_W: tl.constexpr):
    """The RoI of an item, which is PART_H x PART_W of its bins; their first and last row, and column."""
    parts_w: tl.constexpr = (OW + PART_W - 1) // PART_W
    parts: tl.constexpr = (OH + PART_H - 1) // PART_H * parts_w
    first_i = item % parts // parts_w * PART_H
    first_j = item % parts % parts_w * PART_W
    last_i = tl.minimum(first_i + PART_H, OH) - 1
    last_j = tl.minimum(first_j + PART_W, OW) - 1
    return item // parts, first_i, last_i, first_j, last_j
