"""Matching of boxes to objects by the matrix of all overlaps: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    gt_crowd: Tensor | None = None,
    crowd_overlap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """All fields of `op.BoxMatches` (Faster R-CNN, arXiv 1506.01497, section 3.1.2).

    Arguments are those of `op.match_boxes`. Overlaps have the dtype of the boxes, which is float32 there.
    NaN counts as the highest, as in torch.max, and as no one's best.
    """
    a, b = boxes[:, :, None], gt_boxes[:, None]  # (N, B, G, 4)
    extent = torch.minimum(a[..., 2:], b[..., 2:]) - torch.maximum(a[..., :2], b[..., :2])
    inter = extent.clamp(min=0).prod(-1)
    area, gt_area = ((t[..., 2:] - t[..., :2]).prod(-1) for t in (a, b))
    overlap = torch.where(inter > 0, inter / (area + gt_area - inter), 0.0)  # (N, B, G)
    overlap = overlap.where(gt_valid[:, None], -1.0)
    # A maximum of nothing is an error: for where there are no objects, and no boxes.
    best, matched = overlap.new_full(overlap.shape[:2], -1.0), overlap.new_zeros(overlap.shape[:2]).long()
    gt_best = torch.where(gt_valid, 0.0, -1.0).to(overlap.dtype)
    if overlap.shape[2]:
        best, matched = overlap.max(2)
    if overlap.shape[1]:
        gt_best = overlap.amax(1)
    is_best = ((overlap == gt_best[:, None]) & (gt_best[:, None] > 0)).any(2)
    in_crowd = None
    if gt_crowd is not None and crowd_overlap is not None:
        in_crowd = ((inter / area >= crowd_overlap) & gt_crowd[:, None]).any(2)
    return best, matched, gt_best, is_best, in_crowd
