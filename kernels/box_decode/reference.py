"""Predicted boxes from their deltas in PyTorch; what CPU tensors run."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

MAX_LOG_SCALE = math.log(1000.0 / 16)
"""A side grows by at most this factor, so that exp() stays finite (torchvision and detectron2)."""


def box_dtype(deltas: Tensor, references: Tensor) -> torch.dtype:
    """float64 if either is, else float32."""
    return torch.promote_types(torch.promote_types(deltas.dtype, references.dtype), torch.float32)


def decode_boxes(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    scores: Tensor | None,
    weights: Sequence[float],
    max_log_scale: float,
    min_side: float | None,
    score_threshold: float | None,
) -> tuple[Tensor, Tensor]:
    """See `op.decode_boxes`."""
    dtype = box_dtype(deltas, references)
    deltas, references = deltas.to(dtype), references.to(dtype)
    size = references[..., 2:] - references[..., :2]
    center = references[..., :2] + 0.5 * size
    wx, wy, ww, wh = weights
    shift = torch.stack([deltas[..., 0] / wx, deltas[..., 1] / wy], -1)
    scale = torch.stack([deltas[..., 2] / ww, deltas[..., 3] / wh], -1).clamp(max=max_log_scale)
    center = center + shift * size
    half = 0.5 * (size * torch.exp(scale))
    boxes = torch.cat([center - half, center + half], -1)

    valid = boxes.isfinite().all(-1)
    limit = sizes.to(dtype).flip(-1).repeat(1, 2)[:, None, :]  # (N, 1, 4): w, h, w, h
    boxes = torch.minimum(boxes.clamp(min=0), limit)
    if min_side is not None:
        valid = valid & ((boxes[..., 2:] - boxes[..., :2]).amin(-1) > min_side)
    if scores is not None:
        scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
        valid = valid & scores.isfinite()
        if score_threshold is not None:
            valid = valid & (scores > score_threshold)
    return torch.where(valid[..., None], boxes, 0.0), valid
