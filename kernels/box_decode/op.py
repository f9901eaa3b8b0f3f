"""Predicted boxes from their deltas: the public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._library import NAMESPACE, chosen, in_full_precision, runs_triton, switchable
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
    _check(deltas, references, sizes, scores)
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


def _check(deltas: Tensor, references: Tensor, sizes: Tensor, scores: Tensor | None) -> None:
    if deltas.ndim != 3 or deltas.shape[2] != 4:
        raise ValueError(f"deltas must be (N, B, 4), got {tuple(deltas.shape)}")
    images, total = deltas.shape[:2]
    if tuple(references.shape) not in ((images, total, 4), (1, total, 4)):
        raise ValueError(
            f"references must be {(images, total, 4)} or {(1, total, 4)}, got {tuple(references.shape)}"
        )
    if tuple(sizes.shape) != (images, 2):
        raise ValueError(f"sizes must be {(images, 2)}, got {tuple(sizes.shape)}")
    if scores is not None and tuple(scores.shape) != (images, total):
        raise ValueError(f"scores must be {(images, total)}, got {tuple(scores.shape)}")
    for name, tensor in (("deltas", deltas), ("references", references), ("scores", scores)):
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("references", references), ("sizes", sizes), ("scores", scores)):
        if tensor is not None and tensor.device != deltas.device:
            raise ValueError(f"{name} must be on {deltas.device} as deltas are, got {tensor.device}")


@torch.library.custom_op(f"{NAMESPACE}::decode_boxes", mutates_args=())
def _decode_boxes(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    scores: Tensor | None,
    weights: Sequence[float],
    max_log_scale: float,
    min_side: float | None,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    if runs_triton(deltas):
        from . import kernel

        return kernel.decode_boxes(
            deltas, references, sizes, scores, weights, max_log_scale, min_side, score_threshold
        )
    arguments = (references, sizes, scores, weights, max_log_scale, min_side, score_threshold)
    return in_full_precision(reference.decode_boxes, deltas, *arguments)


@_decode_boxes.register_fake
def _(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    scores: Tensor | None,
    weights: Sequence[float],
    max_log_scale: float,
    min_side: float | None,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    dtype = reference.box_dtype(deltas, references)
    return deltas.new_empty(deltas.shape, dtype=dtype), deltas.new_empty(deltas.shape[:2], dtype=torch.bool)
