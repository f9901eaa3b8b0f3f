"""Predicted boxes from their deltas: the public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.checks import require
from ..common.library import chosen, register, switchable
from . import reference
from .reference import MAX_LOG_SCALE


@switchable
def decode_boxes(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    *,
    scores: Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_scale: float = MAX_LOG_SCALE,
    min_side: float | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Boxes that deltas make of anchors or proposals (R-CNN, arXiv 1311.2524, appendix C), and which count.

    Computed in float32 whatever the dtype of the deltas, in float64 if deltas or references are.

    Args:
        deltas: (N, B, 4) floating point dx, dy, dw, dh: the centre moves by dx and dy sides of the
            reference, the sides grow by exp(dw) and exp(dh).
        references: (N, B, 4) floating point xyxy in pixels, or (1, B, 4) shared by all images.
        sizes: (N, 2) height and width of each image in pixels, to which its boxes are clipped.
        scores: (N, B) floating point; a box whose score is not finite is not valid.
        weights: what dx, dy, dw and dh were multiplied by when they were learned; not 0.
        max_log_scale: dw and dh above it count as that much.
        min_side: a box is valid if both sides, after clipping, are longer than this; None: any length.
        score_threshold: a box is valid if its score is above this; None: any finite score.

    Returns:
        boxes: (N, B, 4) float32 (or float64) xyxy within the image; zeros where not valid.
        valid: (N, B) bool, for boxes that are finite before clipping and pass the filters asked for.
        There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or score_threshold comes without
            scores.
    """
    require("deltas", deltas, ("N", "B", 4), "floating point")
    images, total, _ = deltas.shape
    like = ("deltas", deltas)
    require("references", references, [(images, total, 4), (1, total, 4)], "floating point", like)
    require("sizes", sizes, (images, 2), like=like)
    require("scores", scores, (images, total), "floating point", like)
    weights = [float(weight) for weight in weights]
    if len(weights) != 4 or not all(weights):
        raise ValueError(f"weights must be four numbers other than 0, got {tuple(weights)}")
    if score_threshold is not None and scores is None:
        raise ValueError("score_threshold needs scores")
    decode = chosen("decode_boxes", _decode_boxes, reference.decode_boxes)
    return decode(
        deltas.detach(),
        references.detach(),
        sizes,
        None if scores is None else scores.detach(),
        weights,
        float(max_log_scale),
        None if min_side is None else float(min_side),
        None if score_threshold is None else float(score_threshold),
    )


_decode_boxes = register(reference.decode_boxes)


@_decode_boxes.register_fake
def _(deltas: Tensor, references: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    dtype = reference.box_dtype(deltas, references)
    return deltas.new_empty(deltas.shape, dtype=dtype), deltas.new_empty(deltas.shape[:2], dtype=torch.bool)
