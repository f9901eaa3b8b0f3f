"""Which ground truth each box belongs to."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from fastmrcnn.kernels import match_boxes
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
    found = match_boxes(
        boxes,
        targets.boxes,
        targets.valid,
        low_quality=low_quality,
        gt_crowd=None if crowd_overlap is None else targets.crowd,
        crowd_overlap=crowd_overlap,
    )
    is_foreground = found.best >= foreground_iou
    is_background = found.best < background_iou
    if found.is_best is not None:
        is_foreground = is_foreground | found.is_best
        is_background = is_background & ~found.is_best
    if found.in_crowd is not None:
        is_background = is_background & ~found.in_crowd
    return Matches(found.matched, is_foreground, is_background)
