"""FPN level assignment in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-6
"""In levels: a box this little below a border belongs to the level above it, as in torchvision."""


def first_threshold(k_min: int, canonical_size: float, canonical_level: int) -> float:
    """Area from which a box is on the level above k_min; each further level takes four times as much."""
    side = canonical_size * 2.0 ** (k_min + 1 - canonical_level - EPS)
    return side * side


def assign_levels(
    boxes: Tensor, k_min: int, k_max: int, canonical_size: float, canonical_level: int
) -> Tensor:
    """floor(canonical_level + log2(sqrt(area) / canonical_size) + EPS), clamped to k_min..k_max, less k_min.

    Written as comparisons of areas, so that every device gives the same level on a border: the
    logarithm is rounded differently by each.

    Args:
        boxes: (..., 4) xyxy; half precision is widened to float32.

    Returns:
        (...) int32, 0 for k_min.
    """
    boxes = boxes.to(torch.promote_types(boxes.dtype, torch.float32))
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    level = torch.zeros(area.shape, dtype=torch.int32, device=area.device)
    threshold = first_threshold(k_min, canonical_size, canonical_level)
    for _ in range(k_max - k_min):
        level += area >= threshold  # false where NaN
        threshold *= 4
    return level
