"""Predicted boxes from their deltas in Triton: a thread for each box."""

# mypy: disallow-untyped-defs=False

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..common.launch import CompileSpec, Launch
from .reference import MAX_LOG_SCALE, box_dtype

BLOCK = 256  # boxes of a program
INFINITY = tl.constexpr(float("inf"))


def decode_boxes(*arguments: Any) -> tuple[Tensor, Tensor]:
    """See `op.decode_boxes`, whose arguments they are."""
    boxes, valid, launch = _launch(*arguments)
    if valid.numel():
        launch.run()
    return boxes, valid


def _launch(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    scores: Tensor | None,
    weights: Sequence[float],
    max_log_scale: float,
    min_side: float | None,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor, Launch]:
    images, total = deltas.shape[:2]
    dtype = box_dtype(deltas, references)
    boxes = torch.empty((images, total, 4), dtype=dtype, device=deltas.device)
    valid = torch.empty((images, total), dtype=torch.bool, device=deltas.device)
    references = references.contiguous().expand(images, -1, -1)
    arguments = {
        "deltas_ptr": deltas.contiguous(),
        "references_ptr": references,
        "sizes_ptr": sizes.contiguous(),
        "scores_ptr": None if scores is None else scores.contiguous(),
        "boxes_ptr": boxes,
        "valid_ptr": valid.view(torch.uint8),
        "stride_image": references.stride(0) // 4,
        "total": total,
        "WEIGHTS": tuple(weights),
        "MAX_LOG_SCALE": max_log_scale,
        "MIN_SIDE": min_side,
        "SCORE_THRESHOLD": score_threshold,
        "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32,
        "BLOCK": BLOCK,
    }
    # Without fusion every step but exp() is rounded as PyTorch rounds it.
    options = {"enable_fp_fusion": False}
    launch = Launch(_decode_kernel, (triton.cdiv(total, BLOCK), images), arguments, options=options)
    return boxes, valid, launch


def compile_specs() -> list[CompileSpec]:
    """8 images: the best 2000 boxes of five levels, and 1000 proposals of 80 classes above a score."""
    specs = []
    for name, total, weights, min_side, score_threshold in (
        ("proposals", 10_000, (1.0, 1.0, 1.0, 1.0), 0.0, None),
        ("detections", 80_000, (10.0, 10.0, 5.0, 5.0), None, 0.05),
    ):
        for kind, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            deltas = torch.empty((8, total, 4), dtype=dtype, device="meta")
            references = deltas.new_empty(deltas.shape, dtype=torch.float32)
            scores = references[..., 0]
            sizes = deltas.new_empty((8, 2), dtype=torch.int64)
            filters = (weights, MAX_LOG_SCALE, min_side, score_threshold)
            boxes, valid, launch = _launch(deltas, references, sizes, scores, *filters)
            moved = sum(t.nbytes for t in (deltas, references, sizes, boxes, valid)) + 4 * valid.numel()
            widest = 4 * dtype.itemsize  # a box's deltas at once
            specs.append(launch.spec(f"decode_boxes {name}", kind, moved, 30 * valid.numel(), widest))
    return specs


@triton.jit(do_not_specialize=["stride_image", "total"])
def _decode_kernel(
    deltas_ptr,  # (images, total, 4) floating point dx, dy, dw, dh
    references_ptr,  # (images, total, 4) floating point xyxy, images stride_image rows apart
    sizes_ptr,  # (images, 2) height, width
    scores_ptr,  # (images, total) floating point, or None
    boxes_ptr,  # (images, total, 4) DTYPE xyxy, written
    valid_ptr,  # (images, total) uint8, written
    stride_image,
    total,
    WEIGHTS: tl.constexpr,
    MAX_LOG_SCALE: tl.constexpr,
    MIN_SIDE: tl.constexpr,  # or None
    SCORE_THRESHOLD: tl.constexpr,  # or None
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    image = tl.program_id(1).to(tl.int64)
    box = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = box < total
    row = image * total + box
    height = tl.load(sizes_ptr + image * 2).to(DTYPE)
    width = tl.load(sizes_ptr + image * 2 + 1).to(DTYPE)

    dx, dy, dw, dh = _load_rows(deltas_ptr, row, inside, DTYPE)
    left, top, right, bottom = _load_rows(references_ptr, image * stride_image + box, inside, DTYPE)
    x1, x2, finite_x = _decode_axis(dx, dw, left, right, width, WEIGHTS[0], WEIGHTS[2], MAX_LOG_SCALE)
    y1, y2, finite_y = _decode_axis(dy, dh, top, bottom, height, WEIGHTS[1], WEIGHTS[3], MAX_LOG_SCALE)
    valid = inside & finite_x & finite_y
    if MIN_SIDE is not None:
        valid = valid & (tl.minimum(x2 - x1, y2 - y1) > MIN_SIDE)
    if scores_ptr is not None:
        score = tl.load(scores_ptr + row, mask=inside, other=0.0)
        if score.dtype != tl.float64:
            score = score.to(tl.float32)
        valid = valid & (tl.abs(score) < INFINITY)
        if SCORE_THRESHOLD is not None:
            valid = valid & (score > SCORE_THRESHOLD)
    out = tl.reshape(tl.join(tl.join(x1, x2), tl.join(y1, y2)), (BLOCK, 4))
    at = boxes_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    tl.store(at, tl.where(valid[:, None], out, 0.0), mask=inside[:, None])
    tl.store(valid_ptr + row, valid.to(tl.uint8), mask=inside)


@triton.jit
def _load_rows(rows_ptr, row, inside, DTYPE: tl.constexpr):
    """The four columns of a (..., 4) table at these rows, read 16 bytes at once."""
    at = rows_ptr + row[:, None] * 4 + tl.arange(0, 4)[None, :]
    four = tl.load(at, mask=inside[:, None], other=0.0).to(DTYPE)
    even, odd = tl.split(tl.reshape(four, (row.shape[0], 2, 2)))
    first, third = tl.split(even)
    second, fourth = tl.split(odd)
    return first, second, third, fourth


@triton.jit
def _decode_axis(
    shift,
    scale,
    low,
    high,
    limit,
    SHIFT_WEIGHT: tl.constexpr,
    SCALE_WEIGHT: tl.constexpr,
    MAX_LOG_SCALE: tl.constexpr,
):
    """Ends of the boxes along an axis, clipped to 0..limit, and whether they were finite."""
    size = high - low
    center = low + 0.5 * size
    shift = _divided(shift, SHIFT_WEIGHT)
    scale = _divided(scale, SCALE_WEIGHT)
    scale = tl.where(scale > MAX_LOG_SCALE, MAX_LOG_SCALE, scale)  # NaN stays NaN
    center = center + shift * size
    half = 0.5 * (size * tl.exp(scale))
    low, high = center - half, center + half
    finite = (tl.abs(low) < INFINITY) & (tl.abs(high) < INFINITY)
    return tl.minimum(tl.maximum(low, 0.0), limit), tl.minimum(tl.maximum(high, 0.0), limit), finite


@triton.jit
def _divided(x, WEIGHT: tl.constexpr):
    """By a number, rounded as IEEE asks in float32 too, where Triton's own division is not."""
    divisor = tl.full(x.shape, WEIGHT, x.dtype)
    return x / divisor if x.dtype == tl.float64 else tl.div_rn(x, divisor)
