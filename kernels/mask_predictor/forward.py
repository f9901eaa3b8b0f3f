"""The kernels that read the features in forward, and their launches."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.bitmaps import Bitmaps, Sampling
from ..common.launch import Launch, plain
from ..common.library import sum_dtype
from ..mask_targets.kernel import bitmap_arguments
from ..mask_targets.sampling import target_pixels
from .tiles import (
    STAGES,
    feature_arguments,
    load_features,
    pixels_of,
    predictor_arguments,
    slot_of,
    store_sums,
)

TARGETS = 256  # mask pixels whose targets are computed at once, a thread for each


def logits_launch(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> tuple[Tensor, Launch]:
    arguments, grid = feature_arguments(features)
    slots, _, height, width = features.shape
    logits = features.new_empty((slots, height, width), dtype=sum_dtype(features))
    arguments |= {**predictor_arguments(weight, classes), "bias_ptr": bias.contiguous(), "logits_ptr": logits}
    return logits, Launch(_logits_kernel, grid, arguments)


def loss_launch(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    targets: Tensor | None,
    slot_weight: Tensor,
    ground_truth: tuple[Tensor, Tensor, Tensor, Bitmaps, Sampling] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor], Launch]:
    arguments, grid = feature_arguments(features)
    slots, channels, height, width = features.shape
    like: dict[str, Any] = {"dtype": sum_dtype(features)}
    slope = features.new_empty((slots, height, width), **like)
    weight_sums = features.new_empty((*grid, channels), **like)
    bias_sums, losses = (features.new_empty(grid, **like) for _ in range(2))
    if ground_truth is None:
        unused = {"rois": None, "bitmaps": None, "limits": None}
        arguments |= {**unused, "SAMPLES": 0, "ALIGNED": False, "POSITION": tl.float32}
    else:
        boxes, image, matched, tables, how = ground_truth
        arguments |= bitmap_arguments(boxes, image, matched, slot_weight, tables, how)
        targets = torch.empty_like(slope, dtype=torch.uint8 if how.bitmap else None)
    arguments |= {
        **predictor_arguments(weight, classes),
        "bias_ptr": bias.contiguous(),
        "targets_ptr": None if targets is None else plain(targets),
        "slot_weight_ptr": plain(slot_weight),
        "slope_ptr": slope,
        "weight_sum_ptr": weight_sums,
        "bias_sum_ptr": bias_sums,
        "loss_ptr": losses,
        "SIDE": width,
        "CUT": ground_truth is not None,
        "BITMAP": ground_truth is not None and ground_truth[-1].bitmap,
        "TARGETS": TARGETS,
    }
    return slope, (weight_sums, bias_sums, losses), Launch(_loss_kernel, grid, arguments, num_warps=8)


@triton.jit
def _loss_kernel(
    features_ptr,  # (F, C, M, M) floating point
    weight_ptr,  # (K, C) floating point
    bias_ptr,  # (K,) floating point
    classes_ptr,  # (F,) int
    targets_ptr,  # (F, M, M) any; written if CUT, from what follows
    rois,  # boxes, image, matched, valid; see `target_pixels`
    bitmaps,  # the tables; see `target_pixels`
    limits,
    slot_weight_ptr,  # (F,) any
    slope_ptr,  # (F, M, M) fp32 or fp64, written
    weight_sum_ptr,  # (F, parts, C) as slope, written
    bias_sum_ptr,  # (F, parts) as slope, written
    loss_ptr,  # (F, parts) as slope, written
    stride_slot,
    stride_channel,
    stride_pixel,
    channels,
    pixels,
    part,
    K,
    SIDE: tl.constexpr,
    CUT: tl.constexpr,
    SAMPLES: tl.constexpr,
    ALIGNED: tl.constexpr,
    POSITION: tl.constexpr,
    BITMAP: tl.constexpr,
    TARGETS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    slot = tl.program_id(0).to(tl.int64)
    dtype = slope_ptr.dtype.element_ty
    begin, end = pixels_of(part, pixels)
    active, row = slot_of(classes_ptr, slot_weight_ptr, slot, K, dtype)
    counted = tl.where(active != 0, end, begin)
    slope_ptr += slot * pixels
    targets_ptr += slot * pixels
    if CUT:
        # In memory of their own, not where the slopes will be: the loads below could not go ahead of stores
        # to the same place.
        for first in range(begin, counted, TARGETS):
            pixel = first + tl.arange(0, TARGETS)
            target = target_pixels(
                rois, bitmaps, limits, slot, pixel, pixel < counted, SIDE, SAMPLES, ALIGNED, POSITION
            )
            if BITMAP:
                target = target >= 0.5
            tl.store(targets_ptr + pixel, target.to(targets_ptr.dtype.element_ty), mask=pixel < counted)
        tl.debug_barrier()  # all threads have written before any reads

    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + row * channels + channel, mask=channel < channels, other=0.0).to(dtype)
    bias = tl.load(bias_ptr + row).to(dtype)
    weight_sums = tl.zeros((ROWS, BLOCK_C), dtype)
    bias_sums = tl.zeros((ROWS,), dtype)
    losses = tl.zeros((ROWS,), dtype)
    features_ptr += slot * stride_slot
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        pixel = first + tl.arange(0, ROWS)
        counts = pixel < counted
        x = load_features(features_ptr, pixel, channel, stride_pixel, stride_channel, counts, channels, dtype)
        target = tl.load(targets_ptr + pixel, mask=counts, other=0).to(dtype)
        logit = tl.sum(x * weight[None, :], axis=1) + bias
        small = tl.exp(-tl.abs(logit))
        cross_entropy = tl.maximum(logit, 0.0) - logit * target + tl.log(1.0 + small)
        probability = tl.where(logit >= 0, 1.0, small) / (1.0 + small)
        slope = tl.where(counts, (probability - target) * active, 0.0).to(dtype)
        tl.store(slope_ptr + pixel, slope, mask=pixel < end)
        losses += tl.where(counts, cross_entropy, 0.0)
        bias_sums += slope
        weight_sums += slope[:, None] * x
    place = slot * tl.num_programs(1) + tl.program_id(1)
    tl.store(loss_ptr + place, active * tl.sum(losses, axis=0))
    store_sums(weight_sum_ptr, bias_sum_ptr, place, channel, channels, weight_sums, bias_sums)


@triton.jit
def _logits_kernel(
    features_ptr,  # (F, C, M, M) floating point
    weight_ptr,  # (K, C) floating point
    bias_ptr,  # (K,) floating point
    classes_ptr,  # (F,) int
    logits_ptr,  # (F, M, M) fp32 or fp64, written
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
    dtype = logits_ptr.dtype.element_ty
    begin, end = pixels_of(part, pixels)
    active, row = slot_of(classes_ptr, None, slot, K, dtype)
    counted = tl.where(active != 0, end, begin)
    channel = tl.arange(0, BLOCK_C)
    weight = tl.load(weight_ptr + row * channels + channel, mask=channel < channels, other=0.0).to(dtype)
    bias = tl.load(bias_ptr + row).to(dtype)
    features_ptr += slot * stride_slot
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        pixel = first + tl.arange(0, ROWS)
        counts = pixel < counted
        x = load_features(features_ptr, pixel, channel, stride_pixel, stride_channel, counts, channels, dtype)
        logit = tl.where(counts, tl.sum(x * weight[None, :], axis=1) + bias, 0.0)
        tl.store(logits_ptr + slot * pixels + pixel, logit, mask=pixel < end)
