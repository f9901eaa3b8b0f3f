"""Which ground truth each box belongs to."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastmrcnn.model import boxes as box_ops
from fastmrcnn.structures import Targets


class Matches(NamedTuple):
    matched: Tensor  # (N, B) int64, the ground-truth slot of highest overlap
    is_foreground: Tensor  # (N, B) bool
    is_background: Tensor  # (N, B) bool; neither: ignored


def match(
    boxes: Tensor,
    targets: Targets,
    *,
    foreground_iou: float,
    background_iou: float,
    low_quality: bool = False,
    crowd_overlap: float | None = None,
) -> Matches:
    """Match boxes (N, B, 4), or (1, B, 4) shared by all images, to the objects of each image.

    Foreground overlaps an object by `foreground_iou` or more, background overlaps every object by
    less than `background_iou`. With `low_quality`, the boxes of highest overlap with an object are
    foreground too, however low (arXiv 1506.01497); an object that no box touches gets none. Background
    that lies in a crowd region by `crowd_overlap` or more is ignored.
    """
    overlap = box_ops.iou(boxes, targets.boxes)  # (N, B, G)
    overlap = torch.where(targets.valid[:, None, :], overlap, -1.0)
    best, matched = overlap.max(-1)
    is_foreground = best >= foreground_iou
    is_background = best < background_iou
    if low_quality:
        highest = overlap.amax(1, keepdim=True)  # (N, 1, G)
        is_best = ((overlap == highest) & (highest > 0)).any(-1)
        is_foreground = is_foreground | is_best
        is_background = is_background & ~is_best
    if crowd_overlap is not None:
        inside = box_ops.covered(boxes, targets.boxes) >= crowd_overlap
        is_background = is_background & ~(inside & targets.crowd[:, None, :]).any(-1)
    return Matches(matched, is_foreground, is_background)
