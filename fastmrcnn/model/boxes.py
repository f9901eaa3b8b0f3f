"""What a predictor of boxes has to learn. xyxy, float32, pixels of the padded input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def encode(boxes: Tensor, references: Tensor, weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0)) -> Tensor:
    """Deltas (dx, dy, dw, dh) that move `references` onto `boxes` (arXiv 1311.2524, appendix C).

    Both (..., 4). Empty boxes are treated as a pixel wide, so that slots without an object stay finite.
    `kernels.decode_boxes` is the inverse.
    """
    ref_center, ref_size = _center_size(references)
    center, size = _center_size(boxes)
    shift = (center - ref_center) / ref_size
    scale = torch.log(size / ref_size)
    # Number by number: a tensor of them would be copied to the device, which waits.
    columns = torch.cat([shift, scale], -1).unbind(-1)
    return torch.stack([column * weight for column, weight in zip(columns, weights, strict=True)], -1)


def _center_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    size = torch.where(size > 0, size, 1.0)
    return boxes[..., :2] + 0.5 * size, size
