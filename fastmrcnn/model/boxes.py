"""Boxes: overlap, encoding, clipping. xyxy, float32, pixels of the padded input."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

# A box may grow by at most this factor in one step, so that exp() stays finite (both peers).
MAX_LOG_SCALE = math.log(1000.0 / 16)


def area(boxes: Tensor) -> Tensor:
    """(..., 4) -> (...)"""
    return (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])


def intersection(a: Tensor, b: Tensor) -> Tensor:
    """(..., A, 4), (..., B, 4) -> (..., A, B) area in common."""
    low = torch.maximum(a[..., :, None, :2], b[..., None, :, :2])
    high = torch.minimum(a[..., :, None, 2:], b[..., None, :, 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    return width * height


def iou(a: Tensor, b: Tensor) -> Tensor:
    """Intersection over union: (..., A, 4), (..., B, 4) -> (..., A, B). Two empty boxes give 0."""
    inter = intersection(a, b)
    union = area(a)[..., :, None] + area(b)[..., None, :] - inter
    return torch.where(inter > 0, inter / torch.where(inter > 0, union, 1.0), 0.0)


def covered(a: Tensor, b: Tensor) -> Tensor:
    """Share of each box of `a` that lies in each box of `b`: (..., A, B)."""
    inter = intersection(a, b)
    return torch.where(inter > 0, inter / torch.where(inter > 0, area(a)[..., :, None], 1.0), 0.0)


def encode(boxes: Tensor, references: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `references` onto `boxes` (arXiv 1311.2524, appendix C).

    Both (..., 4). Empty boxes are treated as a pixel wide, so that slots without an object stay finite.
    """
    ref_center, ref_size = _center_size(references)
    center, size = _center_size(boxes)
    shift = (center - ref_center) / ref_size
    scale = torch.log(size / ref_size)
    return torch.cat([shift, scale], -1) * shift.new_tensor(weights)


def decode(deltas: Tensor, references: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Inverse of `encode`: (..., 4) deltas and references -> (..., 4) boxes, float32."""
    deltas = deltas.float()
    size = references[..., 2:] - references[..., :2]
    center = references[..., :2] + 0.5 * size
    wx, wy, ww, wh = weights
    shift = torch.stack([deltas[..., 0] / wx, deltas[..., 1] / wy], -1)
    scale = torch.stack([deltas[..., 2] / ww, deltas[..., 3] / wh], -1).clamp(max=MAX_LOG_SCALE)
    center = center + shift * size
    half = 0.5 * (size * torch.exp(scale))
    return torch.cat([center - half, center + half], -1)


def clip(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clip (N, B, 4) boxes to (N, 2) image heights and widths."""
    limit = sizes.to(boxes.dtype).flip(-1).repeat(1, 2)[:, None, :]  # (N, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limit)


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    size = torch.where(size > 0, size, 1.0)
    return boxes[..., :2] + 0.5 * size, size
