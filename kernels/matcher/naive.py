"""Matching of boxes to objects by the matrix of all their overlaps: the definition."""

from __future__ import annotations

import torch
from torch import Tensor


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The fields of `op.BoxMatches` (Faster R-CNN, arXiv 1506.01497, section 3.1.2).

    Arguments are those of `op.match_boxes`; without `gt_crowd` it does not matter what `crowd_overlap` is.
    Overlaps have the dtype of the boxes, which is float32 there. NaN counts as the highest, as in torch.max,
    and as no one's best.
    """
    a, b = boxes[:, :, None], gt_boxes[:, None]  # (N, B, G, 4)
    low, high = torch.maximum(a[..., :2], b[..., :2]), torch.minimum(a[..., 2:], b[..., 2:])
    width, height = (high - low).clamp(min=0).unbind(-1)
    inter = width * height  # (N, B, G)
    area, gt_area = ((t[..., 2] - t[..., 0]) * (t[..., 3] - t[..., 1]) for t in (a, b))
    nothing = torch.where(gt_valid, 0.0, -1.0).to(inter.dtype)  # the overlap with what does not touch
    touching = (inter > 0) & gt_valid[:, None]
    overlap = torch.where(touching, inter / (area + gt_area - inter), nothing[:, None])

    images, total, objects = overlap.shape
    best, index = (
        overlap.new_full((images, total), -1.0),
        gt_valid.new_zeros((images, total), dtype=torch.int64),
    )
    if objects:
        best, index = overlap.max(-1)
    gt_best = is_best = in_crowd = None
    if low_quality:
        gt_best = overlap.amax(1) if total else nothing
        is_best = ((overlap == gt_best[:, None]) & (gt_best[:, None] > 0)).any(-1)
    if gt_crowd is not None:
        share = torch.where(inter > 0, inter / area, 0.0)
        in_crowd = ((share >= crowd_overlap) & gt_crowd[:, None]).any(-1)
    return best, index, gt_best, is_best, in_crowd
