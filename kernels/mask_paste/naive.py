"""Mask paste, pixel by pixel: the definition, in float64."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    *,
    valid: Tensor | None = None,
) -> Tensor:
    """(D, H, W) bool: detectron2's `paste_masks_in_image`; see `op.paste_masks`.

    Zeros for a slot that is not valid and for a box whose extent, in its own dtype, is not finite or not
    above 0.
    """
    bitmaps = torch.zeros((len(masks), height, width), dtype=torch.bool)
    for d, (mask, box) in enumerate(zip(masks, boxes, strict=True)):
        extent = box[2:] - box[:2]
        if (extent.isfinite() & (extent > 0)).all() and (valid is None or valid[d]):
            bitmaps[d] = probabilities(mask, box.tolist(), height, width) >= threshold
    return bitmaps


def probabilities(mask: Tensor, box: list[float], height: int, width: int) -> Tensor:
    """(height, width): the mask (M, M) over its box, bilinear at the pixels' centres, zeros around it."""
    cells, side = mask.double().tolist(), len(mask)
    x0, y0, x1, y1 = box
    out = torch.zeros((height, width), dtype=torch.float64)
    for row in range(height):
        for column in range(width):
            v = (row + 0.5 - y0) / (y1 - y0) * side - 0.5
            u = (column + 0.5 - x0) / (x1 - x0) * side - 0.5
            top, left = math.floor(v), math.floor(u)
            for i, down in ((top, 1 - (v - top)), (top + 1, v - top)):
                for j, over in ((left, 1 - (u - left)), (left + 1, u - left)):
                    if 0 <= i < side and 0 <= j < side:
                        out[row, column] += down * over * cells[i][j]
    return out
