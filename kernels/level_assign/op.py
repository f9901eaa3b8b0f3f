"""FPN level assignment: the public function and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import require
from ..common.library import chosen, register, switchable
from . import reference


@switchable
def assign_levels(
    boxes: Tensor,
    *,
    k_min: int = 2,
    k_max: int = 5,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
) -> Tensor:
    """Pyramid level of each box (FPN, arXiv 1612.03144, eq. 1), as torchvision and detectron2 compute it.

    Args:
        boxes: (..., 4) floating point, xyxy in input pixels. Boxes without area and boxes that are NaN
            map to k_min.
        k_min: finest level, whose stride is 2**k_min.
        k_max: coarsest level.
        canonical_size: side of a square box, in input pixels, that belongs to canonical_level.
        canonical_level: see canonical_size.

    Returns:
        (...) int32, counted from k_min.

    Raises:
        ValueError: the last axis of boxes is not 4, boxes are not floating point, k_max is below k_min,
            or canonical_size is not positive.
    """
    require("boxes", boxes, ("...", 4), "floating point")
    if k_max < k_min:
        raise ValueError(f"k_max must be at least k_min, got {k_max} and {k_min}")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be positive, got {canonical_size}")
    assign = chosen("assign_levels", _assign_levels, reference.assign_levels)
    return assign(boxes.detach(), k_min, k_max, float(canonical_size), canonical_level)


_assign_levels = register(reference.assign_levels)


@_assign_levels.register_fake
def _(boxes: Tensor, *rest: Any) -> Tensor:
    return torch.empty(boxes.shape[:-1], dtype=torch.int32, device=boxes.device)
