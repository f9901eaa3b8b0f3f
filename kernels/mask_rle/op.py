"""Mask RLE: public function and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import check_range, require, require_at_least
from ..common.library import register
from ..mask_paste.checks import check
from . import reference


def mask_rle(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    *,
    max_runs: int = 4096,
    sizes: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Run lengths of the bitmaps of `paste_masks`, made without them: COCO's uncompressed RLE.

    Runs go down the columns, from left to right; the first is of zeros and may be empty, and zeros and ones
    take turns. The host does not wait.

    Args:
        masks: (D, M, M) floating point, probabilities within the box.
        boxes: (D, 4) floating point xyxy in output pixels; see `paste_masks`.
        height, width: of the image, in pixels; with `sizes`, of the largest.
        threshold: a pixel belongs to the object from this probability on; above 0, at most 1. The kernels
            are compiled for it.
        max_runs: room for the runs of an object.
        sizes: (D, 2) integer, height and width of each object's own image, at most `height` and `width`,
            where the objects are those of several images. None: all have `height` and `width`.
        valid: (D,) bool; slots that are not valid are empty bitmaps. None: all are.

    Returns:
        runs: (D, max_runs) int32, 0 behind an object's last run.
        count: (D,) int32, how many runs the object has, also if that is more than `max_runs`. Then `runs`
            holds the first of them only.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or an image has 2^31 pixels or more; in
            eager mode on the CPU also if a size is out of range, which elsewhere is clamped.
    """
    check(masks, boxes, height, width, threshold, valid)
    require("sizes", sizes, (masks.shape[0], 2), "integer", ("masks", masks))
    if sizes is not None:
        for name, limit, column in (("heights", height, 0), ("widths", width, 1)):
            check_range(f"{name} in sizes", sizes[:, column], limit + 1)
    require_at_least("max_runs", max_runs, 1)
    if height * width >= 2**31:
        raise ValueError(f"an image must have fewer than 2^31 pixels, got {height} x {width}")
    return _mask_rle(masks.detach(), boxes.detach(), sizes, valid, height, width, threshold, max_runs)


_mask_rle = register(reference.mask_rle)


@_mask_rle.register_fake
def _(masks: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    runs = masks.new_empty((masks.shape[0], rest[-1]), dtype=torch.int32)
    return runs, masks.new_empty((masks.shape[0],), dtype=torch.int32)
