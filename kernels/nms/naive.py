"""Greedy non-maximum suppression, one box at a time: the definition.

Arguments are those of the functions of the same name in `op`. IoU is torchvision's, in float32 whatever the
dtype of the boxes, compared with the threshold in float64.
"""

from __future__ import annotations

import torch
from torch import Tensor


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """(kept,) int64, by falling score."""
    return batched_nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """(kept,) int64: the best box left is kept, and drops those of its category that it overlaps.

    Equal scores stand by rising index, NaN before all others.
    """
    dropped = torch.zeros(len(boxes), dtype=torch.bool)
    kept = []
    for i in scores.argsort(stable=True, descending=True).tolist():
        if not dropped[i]:
            kept.append(i)
            overlaps = iou(boxes[i].float(), boxes.float()).double() > iou_threshold
            dropped |= overlaps if idxs is None else overlaps & (idxs == idxs[i])
    return torch.tensor(kept, dtype=torch.int64)


def iou(box: Tensor, boxes: Tensor) -> Tensor:
    """(P,) of a box (4,) and boxes (P, 4). Of two without area it is NaN, which is above no threshold."""
    corner, opposite = torch.maximum(box[:2], boxes[:, :2]), torch.minimum(box[2:], boxes[:, 2:])
    inter = (opposite - corner).clamp(min=0).prod(1)
    area, areas = (b[..., 2:] - b[..., :2] for b in (box, boxes))
    return inter / (area.prod() + areas.prod(1) - inter)


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    max_out: int,
) -> tuple[Tensor, Tensor]:
    """Index and valid, (N, max_out): of each image alone what `batched_nms` keeps of the slots that count."""
    index = torch.zeros((len(boxes), max_out), dtype=torch.int64)
    kept_valid = torch.zeros((len(boxes), max_out), dtype=torch.bool)
    usable = boxes.float().isfinite().all(-1) & ~scores.isnan()
    usable = usable if valid is None else usable & valid
    for image, counts in enumerate(usable):
        (slots,) = torch.where(counts)
        idxs = None if groups is None else groups[image, slots]
        kept = slots[batched_nms(boxes[image, slots], scores[image, slots], idxs, iou_threshold)][:max_out]
        index[image, : len(kept)], kept_valid[image, : len(kept)] = kept, True
    return index, kept_valid
