"""Device functions that resample an image at some of its rows and columns, step by step as `cpu.py` does."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl

BITS = tl.constexpr(22)  # behind the point of a weight
ONE, HALF = tl.constexpr(1 << 22), tl.constexpr(1 << 21)  # as weights have it


@triton.jit
def axis_window(place, source, result):
    """Of places along an axis: the first source pixel, where its weight stands, and the scale of the weights.

    The weight of pixel first + i is max(0, 2S - |start + 2 i result|), times the scale, where S is the larger
    length; see `weight_at`. All numbers stay within 32 bits for sides whose product is below 2**29.
    """
    larger = tl.maximum(source, result)
    centre = (2 * place + 1) * source
    first = tl.maximum(centre - 2 * larger + result, 0) // (2 * result)
    start = (2 * first + 1) * result - centre
    total = tl.zeros_like(place)
    for tap in range(taps_of(source, result)):
        total += share_at(first, start, tap, source, result)
    return first, start, ONE / total.to(tl.float64)


@triton.jit
def taps_of(source, result):
    """How many source pixels count for one of the result."""
    return tl.minimum(tl.cdiv(2 * tl.maximum(source, result), result), source)


@triton.jit
def share_at(first, start, tap, source, result):
    """The weight of a pixel, not scaled yet; 0 behind the last one."""
    share = 2 * tl.maximum(source, result) - tl.abs(start + 2 * tap * result)
    return tl.where(first + tap < source, tl.maximum(share, 0), 0)


@triton.jit
def weight_at(first, start, scale, tap, source, result):
    return (share_at(first, start, tap, source, result) * scale + 0.5).to(tl.int32)


@triton.jit
def resample(image_ptr, y, x, source_h, source_w, result_h, result_w):
    """Red, green, blue, int32, at the rows y and columns x of the resized image, which broadcast.

    Args:
        image_ptr: of the image's first byte.
        y, x: within the resized image; what one of them does not depend on is an axis of 1.
    """
    first_y, start_y, scale_y = axis_window(y, source_h, result_h)
    first_x, start_x, scale_x = axis_window(x, source_w, result_w)
    half = tl.zeros_like(y + x) + HALF
    red, green, blue = half, half, half
    for down in range(taps_of(source_h, result_h)):
        weight_y = weight_at(first_y, start_y, scale_y, down, source_h, result_h)
        row = tl.minimum(first_y + down, source_h - 1) * source_w
        line_red, line_green, line_blue = half, half, half
        for over in range(taps_of(source_w, result_w)):
            weight_x = weight_at(first_x, start_x, scale_x, over, source_w, result_w)
            at = image_ptr + (row + tl.minimum(first_x + over, source_w - 1)) * 3
            line_red += weight_x * tl.load(at).to(tl.int32)
            line_green += weight_x * tl.load(at + 1).to(tl.int32)
            line_blue += weight_x * tl.load(at + 2).to(tl.int32)
        red += weight_y * (line_red >> BITS)
        green += weight_y * (line_green >> BITS)
        blue += weight_y * (line_blue >> BITS)
    return red >> BITS, green >> BITS, blue >> BITS
