"""FPN level assignment: the public function and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import NAMESPACE, chosen, runs_triton, switchable
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
    if boxes.ndim < 1 or boxes.shape[-1] != 4:
        raise ValueError(f"boxes must be (..., 4), got {tuple(boxes.shape)}")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating point, got {boxes.dtype}")
    if k_max < k_min:
        raise ValueError(f"k_max must be at least k_min, got {k_max} and {k_min}")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be positive, got {canonical_size}")
    assign = chosen("assign_levels", _assign_levels, reference.assign_levels)
    return assign(boxes.detach(), k_min, k_max, float(canonical_size), canonical_level)


@torch.library.custom_op(f"{NAMESPACE}::assign_levels", mutates_args=())
def _assign_levels(
    boxes: Tensor, k_min: int, k_max: int, canonical_size: float, canonical_level: int
) -> Tensor:
    if runs_triton(boxes):
        from . import kernel

        return kernel.assign_levels(boxes, k_min, k_max, canonical_size, canonical_level)
    return reference.assign_levels(boxes, k_min, k_max, canonical_size, canonical_level)


@_assign_levels.register_fake
def _(boxes: Tensor, k_min: int, k_max: int, canonical_size: float, canonical_level: int) -> Tensor:
    return torch.empty(boxes.shape[:-1], dtype=torch.int32, device=boxes.device)
