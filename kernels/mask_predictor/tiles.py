"""How the kernels go over the features: a few pixels of a slot, with all their channels, at once."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import reach

TILE = 4096  # elements of the features at once
PART = 208  # pixels of a program: a slot of 28 x 28 goes to four, for more bytes on their way at once
STAGES = tl.constexpr(2)  # of a loop over pixels: the loads of the next are on their way


def feature_arguments(features: Tensor) -> tuple[dict[str, Any], tuple[int, int]]:
    """Where pixels and channels lie, and the grid: slots, and parts of a slot's pixels."""
    slots, channels, height, width = features.shape
    rows_apart = height > 1 and width > 1 and features.stride(2) != width * features.stride(3)
    if rows_apart or reach(features) >= 2**31:  # within a slot the kernels count in 32 bits
        features = features.contiguous()
    pixels = height * width
    block_c = triton.next_power_of_2(channels)
    rows = max(1, min(TILE // block_c, 64))
    part = triton.cdiv(triton.cdiv(pixels, triton.cdiv(pixels, PART)), rows) * rows
    arguments = {
        "features_ptr": features,
        "stride_slot": features.stride(0),
        "stride_channel": features.stride(1),
        "stride_pixel": features.stride(3) if width > 1 else features.stride(2),
        "channels": channels,
        "pixels": pixels,
        "part": part,
        "ROWS": rows,
        "BLOCK_C": block_c,
    }
    return arguments, (slots, triton.cdiv(pixels, part))


def predictor_arguments(weight: Tensor, classes: Tensor) -> dict[str, Any]:
    return {"weight_ptr": weight.contiguous(), "classes_ptr": classes.contiguous(), "K": weight.shape[0]}


@triton.jit
def pixels_of(part, pixels):
    """First pixel of this program, and where its pixels end."""
    begin = tl.program_id(1) * part
    return begin, tl.minimum(begin + part, pixels)


@triton.jit
def slot_of(classes_ptr, slot_weight_ptr, slot, K, DTYPE: tl.constexpr):
    """Weight of a slot, 0 if its class is out of range, and the row of the predictor, which is in range."""
    row = tl.load(classes_ptr + slot).to(tl.int64)
    if K == 1:
        row = row * 0
    in_range = (row >= 0) & (row < K)
    active = tl.full((), 1.0, DTYPE)
    if slot_weight_ptr is not None:
        active = tl.load(slot_weight_ptr + slot).to(DTYPE)
    return tl.where(in_range, active, 0.0).to(DTYPE), tl.where(in_range, row, 0)


@triton.jit
def load_features(
    features_ptr, pixel, channel, stride_pixel, stride_channel, counts, channels, DTYPE: tl.constexpr
):
    """(ROWS, BLOCK_C) features of a slot."""
    return tl.load(
        features_ptr + (pixel * stride_pixel)[:, None] + (channel * stride_channel)[None, :],
        mask=counts[:, None] & (channel < channels)[None, :],
        other=0.0,
    ).to(DTYPE)


@triton.jit
def store_sums(weight_sum_ptr, bias_sum_ptr, place, channel, channels, weight_sums, bias_sums):
    at = weight_sum_ptr + place * channels + channel
    tl.store(at, tl.sum(weight_sums, axis=0), mask=channel < channels)
    tl.store(bias_sum_ptr + place, tl.sum(bias_sums, axis=0))


@triton.jit
def scale_of(grad_ptr, divisor_ptr, DTYPE: tl.constexpr):
    scale = tl.full((), 1.0, DTYPE)
    if grad_ptr is not None:
        scale = tl.load(grad_ptr).to(DTYPE) / tl.load(divisor_ptr).to(DTYPE)
    return scale
