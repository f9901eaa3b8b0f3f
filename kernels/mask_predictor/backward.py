"""The kernels of backward, and their launches."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import Launch, plain
from ..common.library import sum_dtype
from .cpu import FeatureLayout, SlotSums
from .tiles import (
    STAGES,
    feature_arguments,
    load_features,
    pixels_of,
    predictor_arguments,
    scale_of,
    slot_of,
    store_sums,
)

SLOTS = 64  # at once, in the sum over the slots of a class
CHANNELS = 32  # of a program there


def sums_launch(
    grad: Tensor, features: Tensor, weight: Tensor, classes: Tensor
) -> tuple[tuple[Tensor, Tensor], Launch]:
    arguments, grid = feature_arguments(features)
    dtype = sum_dtype(features)
    weight_sums = features.new_empty((*grid, features.shape[1]), dtype=dtype)
    bias_sums = features.new_empty(grid, dtype=dtype)
    arguments |= {"classes_ptr": classes.contiguous(), "grad_ptr": grad.contiguous(), "K": weight.shape[0]}
    arguments |= {"weight_sum_ptr": weight_sums, "bias_sum_ptr": bias_sums}
    return (weight_sums, bias_sums), Launch(_sums_kernel, grid, arguments)


def launches(
    grad: Tensor | None,
    sums: SlotSums,
    weight: Tensor,
    classes: Tensor,
    slot_weight: Tensor | None,
    layout: FeatureLayout,
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Launch, Launch]]:
    slots, height, width = sums.slope.shape
    K, channels = weight.shape
    grad_features = layout.empty(slots, channels, height, width, device=weight.device)
    grad_weight = weight.new_empty((K, channels))
    grad_bias = weight.new_empty((K,))
    arguments, grid = feature_arguments(grad_features)
    del arguments["features_ptr"]
    scale = {"grad_ptr": grad, "divisor_ptr": sums.divisor}
    arguments |= {
        **predictor_arguments(weight, classes),
        **scale,
        "slot_weight_ptr": None if slot_weight is None else plain(slot_weight),
        "slope_ptr": sums.slope.contiguous(),
        "grad_features_ptr": grad_features,
    }
    of_features = Launch(_grad_features_kernel, grid, arguments)
    arguments = {
        **scale,
        "classes_ptr": classes.contiguous(),
        "weight_sum_ptr": sums.weight_sums,
        "bias_sum_ptr": sums.bias_sums,
        "grad_weight_ptr": grad_weight,
        "grad_bias_ptr": grad_bias,
        "slots": slots,
        "channels": channels,
        "K": K,
        "SLOTS": SLOTS,
        "BLOCK_C": CHANNELS,
    }
    of_weight = Launch(_grad_weight_kernel, (K, triton.cdiv(channels, CHANNELS)), arguments)
    return (grad_features, grad_weight, grad_bias), (of_features, of_weight)


@triton.jit
def _sums_kernel(
    features_ptr,  # (F, C, M, M) floating point
    classes_ptr,  # (F,) int
    grad_ptr,  # (F, M, M) floating point, of the logits
    weight_sum_ptr,  # (F, parts, C) fp32 or fp64, written
    bias_sum_ptr,  # (F, parts) as weight_sum, written
    stride_slot,
    stride_channel,
    stride_pixel,
    channels,
    pixels,
    part,
    K,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    dtype = weight_sum_ptr.dtype.element_ty
    begin, end = pixels_of(part, pixels)
    active, _ = slot_of(classes_ptr, None, slot, K, dtype)
    counted = tl.where(active != 0, end, begin)
    channel = tl.arange(0, BLOCK_C)
    weight_sums = tl.zeros((ROWS, BLOCK_C), dtype)
    bias_sums = tl.zeros((ROWS,), dtype)
    features_ptr += slot * stride_slot
    for first in tl.range(begin, counted, ROWS, num_stages=STAGES):
        pixel = first + tl.arange(0, ROWS)
        counts = pixel < counted
        x = load_features(features_ptr, pixel, channel, stride_pixel, stride_channel, counts, channels, dtype)
        slope = tl.load(grad_ptr + slot * pixels + pixel, mask=counts, other=0.0).to(dtype)
        bias_sums += slope
        weight_sums += slope[:, None] * x
    place = slot * tl.num_programs(1) + tl.program_id(1)
    store_sums(weight_sum_ptr, bias_sum_ptr, place, channel, channels, weight_sums, bias_sums)


@triton.jit
def _grad_features_kernel(
    weight_ptr,  # (K, C) floating point
    classes_ptr,  # (F,) int
    slot_weight_ptr,  # (F,) any, or None
    grad_ptr,  # () fp32 or fp64, or None
    divisor_ptr,  # () as grad, or None
    slope_ptr,  # (F, M, M) floating point
    grad_features_ptr,  # (F, C, M, M) floating point, written
    stride_slot,
    stride_channel,
    stride_pixel,
    channels,
    pixels,
    part,
    K,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    dtype = tl.float64 if slope_ptr.dtype.element_ty == tl.float64 else tl.float32
    begin, end = pixels_of(part, pixels)
    active, row = slot_of(classes_ptr, slot_weight_ptr, slot, K, dtype)
    counted = tl.where(active != 0, end, begin)
    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + row * channels + channel, mask=channel < channels, other=0.0).to(dtype)
    scale = scale_of(grad_ptr, divisor_ptr, dtype)
    grad_features_ptr += slot * stride_slot
    for first in range(begin, end, ROWS):
        pixel = first + tl.arange(0, ROWS)
        counts = pixel < counted
        slope = tl.load(slope_ptr + slot * pixels + pixel, mask=counts, other=0.0).to(dtype) * scale
        grad = tl.where(counts[:, None], slope[:, None] * weight[None, :], 0.0)
        tl.store(
            grad_features_ptr + (pixel * stride_pixel)[:, None] + (channel * stride_channel)[None, :],
            grad.to(grad_features_ptr.dtype.element_ty),
            mask=(pixel < end)[:, None] & (channel < channels)[None, :],
        )


@triton.jit
def _grad_weight_kernel(
    grad_ptr,  # () fp32 or fp64, or None
    divisor_ptr,  # () as grad, or None
    classes_ptr,  # (F,) int
    weight_sum_ptr,  # (F, C) fp32 or fp64, zero where a slot does not count
    bias_sum_ptr,  # (F,) as weight_sum
    grad_weight_ptr,  # (K, C) floating point, written
    grad_bias_ptr,  # (K,) floating point, written
    slots,
    channels,
    K,
    SLOTS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """The slots of one class, in their order, some channels at once."""
    row = tl.program_id(0)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype = weight_sum_ptr.dtype.element_ty
    weight_sums = tl.zeros((SLOTS, BLOCK_C), dtype)
    bias_sums = tl.zeros((SLOTS,), dtype)
    for first in range(0, slots, SLOTS):
        slot = first + tl.arange(0, SLOTS)
        mine = slot < slots
        if K > 1:
            mine = mine & (tl.load(classes_ptr + slot, mask=mine, other=0) == row)
        at = (slot.to(tl.int64) * channels)[:, None] + channel[None, :]
        mask = mine[:, None] & (channel < channels)[None, :]
        weight_sums += tl.load(weight_sum_ptr + at, mask=mask, other=0.0)
        bias_sums += tl.load(bias_sum_ptr + slot, mask=mine, other=0.0)
    scale = scale_of(grad_ptr, divisor_ptr, dtype)
    grad_weight = (tl.sum(weight_sums, axis=0) * scale).to(grad_weight_ptr.dtype.element_ty)
    tl.store(grad_weight_ptr + row.to(tl.int64) * channels + channel, grad_weight, mask=channel < channels)
    grad_bias = (tl.sum(bias_sums, axis=0) * scale).to(grad_bias_ptr.dtype.element_ty)
    tl.store(grad_bias_ptr + row, grad_bias, mask=tl.program_id(1) == 0)
