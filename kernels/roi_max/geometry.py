"""Device functions of the kernels: where an RoI and the points of its bins lie.

They take one RoI as scalars or a block of them, and follow `points.py` step by step.
"""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(
    low, high, scale,
    BINS: tl.constexpr, SAMPLES: tl.constexpr, ALIGNED: tl.constexpr, KIND: tl.constexpr, MOST: tl.constexpr,
):  # fmt: skip
    """Start, length of a bin, distance of its samples, and samples per bin, in pixels of the level.

    A box whose sides overflow is moved off the map.
    """
    if KIND == "align":
        start = low * scale - 0.5 if ALIGNED else low * scale
        side = high * scale - 0.5 - start if ALIGNED else tl.maximum(high * scale - start, 1.0)
    else:
        start = _round(low * scale)
        side = tl.maximum(_round(high * scale) - start + 1, 1.0)
        if KIND == "warp":
            start -= 0.5
    finite = side - side == 0
    start = tl.where(finite, start, 1e9).to(side.dtype)
    side = tl.where(finite, side, 1.0).to(side.dtype)
    length = _divide(side, (side * 0.0 + BINS).to(side.dtype))
    samples = tl.ceil(length) if SAMPLES == 0 else length * 0.0 + SAMPLES
    samples = tl.minimum(tl.maximum(samples, 0.0), MOST).to(side.dtype)
    return start, length, _divide(length, tl.maximum(samples, 1.0).to(side.dtype)), samples


@triton.jit
def _round(x):
    """To whole numbers, halves away from zero. Comparing keeps the sum from being fused with a product."""
    whole = tl.floor(tl.abs(x))
    whole = tl.where(tl.abs(x) >= whole + 0.5, whole + 1, whole)
    return tl.where(x < 0, -whole, whole)


@triton.jit
def window(bins, start, length, step, samples, size, KIND: tl.constexpr):
    """First and end of the points of each bin that matter."""
    bins = (length * 0.0 + bins).to(length.dtype)
    if KIND == "pool":
        first = start + tl.floor(bins * length)
        end = start + tl.ceil((bins + 1) * length)
        limit = size.to(length.dtype)
    else:
        begin = start + bins * length
        ordered = step > 0  # inverted boxes: all samples
        scale = 1.0 / tl.where(ordered, step, 1.0)
        first = tl.where(ordered, tl.floor((-1 - begin) * scale - 0.5) - 1, 0.0)
        end = tl.where(ordered, tl.ceil((size - begin) * scale - 0.5) + 2, samples)
        limit = samples
    first = tl.minimum(tl.maximum(first, 0.0), limit).to(tl.int32)
    end = tl.minimum(tl.maximum(end, 0.0), limit).to(tl.int32)
    return first, tl.maximum(first, end)


@triton.jit
def sample_at(number, bins, start, length, step):
    """Where a sample lies."""
    return start + bins.to(length.dtype) * length + (number.to(length.dtype) + 0.5) * step


@triton.jit
def on_map(at, size):
    return (at >= -1) & (at <= size)


@triton.jit
def onto_map(at, size):
    return tl.minimum(tl.maximum(at, 0.0), (size - 1).to(at.dtype))


@triton.jit
def lines_of(start, length, samples, size, BINS: tl.constexpr):
    """First and last line that a point of any bin can touch; the last is before the first if none can."""
    other = start + BINS * length
    low = tl.minimum(start, other)  # other is the lower in inverted boxes
    high = tl.maximum(start, other)
    touches = (samples >= 1) & (high >= -1) & (low <= size)
    border = (size - 1).to(length.dtype)
    first = tl.floor(tl.minimum(tl.maximum(low, 0.0), border)).to(tl.int32)
    last = tl.floor(tl.minimum(tl.maximum(high, 0.0), border)).to(tl.int32) + 1
    return first, tl.where(touches, tl.minimum(last, size - 1), first - 1)


@triton.jit
def bins_of_tile(line, start, length, BINS: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr):
    """First and last bin that can have a point within a pixel of the tile's lines."""
    slack = 1 if KIND == "pool" else 0  # bins are rounded by floor and ceil
    low = tl.floor((line - 1 - start) / length) - slack
    high = tl.floor((line + TILE - start) / length) + slack
    ordered = length > 0  # an inverted or empty box: all bins
    low = tl.where(ordered, tl.minimum(tl.maximum(low, 0.0), BINS - 1.0), 0.0)
    high = tl.where(ordered, tl.minimum(tl.maximum(high, 0.0), BINS - 1.0), BINS - 1.0)
    return low.to(tl.int32), high.to(tl.int32)


@triton.jit
def _divide(x, y):
    """IEEE division: samples at the border of the map must lie where cpu.py sees them."""
    return x / y if x.dtype == tl.float64 else tl.div_rn(x, y)
