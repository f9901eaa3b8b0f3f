"""What mask paste and mask RLE refuse."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.checks import require, require_at_least


def check(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, valid: Tensor | None
) -> None:
    """Raise ValueError for what `paste_masks` says it raises for."""
    require("masks", masks, ("D", "M", "M"), "floating point")
    slots, like = masks.shape[0], ("masks", masks)
    require("boxes", boxes, (slots, 4), "floating point", like)
    require("valid", valid, (slots,), torch.bool, like)
    require_at_least("height", height, 1)
    require_at_least("width", width, 1)
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")
