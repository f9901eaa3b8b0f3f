"""Matching of boxes to objects as CPU tensors run it, in PyTorch; `naive.py` says what it computes."""

from __future__ import annotations

import torch
from torch import Tensor

PAIRS = 1 << 20  # of a box and an object that are looked at together, or as many as there are boxes


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See `op.match_boxes`; what was not asked for is empty."""
    slots = (gt_valid.shape[0], boxes.shape[1])
    best = boxes.new_full(slots, -1.0, dtype=torch.float32)
    index = boxes.new_zeros(slots, dtype=torch.int64)
    gt_best = torch.where(gt_valid, 0.0, -1.0)
    is_best, in_crowd = (boxes.new_zeros(slots, dtype=torch.bool) for _ in range(2))
    box, gt = _sides(boxes).expand(slots[0], -1, -1), _sides(gt_boxes)
    for image in range(slots[0] if boxes.shape[1] else 0):
        crowd = None if gt_crowd is None else gt_crowd[image]
        outputs = (best[image], index[image], gt_best[image], is_best[image], in_crowd[image])
        asked = (gt_valid[image], crowd, low_quality, crowd_overlap)
        _match_image(box[image], gt[image, ..., None], *asked, *outputs)
    nothing = best.new_empty((0,))
    return (
        best,
        index,
        gt_best if low_quality else nothing,
        is_best if low_quality else nothing.bool(),
        nothing.bool() if gt_crowd is None else in_crowd,
    )


def _match_image(
    box: Tensor,
    gt: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
    best: Tensor,
    index: Tensor,
    gt_best: Tensor,
    is_best: Tensor,
    in_crowd: Tensor,
) -> None:
    """Boxes of sides (4, B) and objects of sides (4, G, 1); the last five are written.

    All boxes meet a few objects at a time. Such an object has then met every box, so that its highest
    overlap is known while its overlaps are still at hand.
    """
    area, gt_area = _area(box), _area(gt)
    step = max(1, PAIRS // box.shape[1])
    for first in range(0, len(gt_valid), step):
        few = slice(first, first + step)
        inter = _intersection(box, gt[:, few])  # (g, B)
        if gt_crowd is not None:
            in_crowd |= ((inter / area >= crowd_overlap) & gt_crowd[few, None]).any(0)
        # Not touching where NaN.
        touching = (inter > 0) & gt_valid[few, None]
        union = (area + gt_area[few]).sub_(inter)
        overlap = torch.where(touching, inter.div_(union), torch.where(gt_valid, 0.0, -1.0)[few, None])
        if low_quality:
            gt_best[few] = highest = overlap.amax(1)
            is_best |= (overlap == torch.where(highest > 0, highest, torch.nan)[:, None]).any(0)
        found, which = overlap.max(0)
        better = (found > best) | (found.isnan() & ~best.isnan())  # NaN is the highest, as in torch.max
        index.copy_(torch.where(better, which + first, index))
        torch.maximum(best, found, out=best)


def _sides(boxes: Tensor) -> Tensor:
    """(N, B, 4) -> (N, 4, B) float32 x1, y1, x2, y2, each contiguous."""
    return boxes.float().mT.contiguous()


def _area(sides: Tensor) -> Tensor:
    return (sides[2] - sides[0]) * (sides[3] - sides[1])


def _intersection(a: Tensor, b: Tensor) -> Tensor:
    """Area in common of sides (4, ...)."""
    width, height = (
        torch.minimum(a[axis + 2], b[axis + 2]).sub_(torch.maximum(a[axis], b[axis])).clamp_(min=0)
        for axis in (0, 1)
    )
    return width.mul_(height)
