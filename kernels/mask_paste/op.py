"""Mask paste: public function and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import NAMESPACE, chosen, runs_triton, switchable
from . import cpu
from .checks import check


@switchable
def paste_masks(
    masks: Tensor,
    boxes: Tensor,
    height: int,
    width: int,
    threshold: float = 0.5,
    *,
    packed: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """Bitmaps of the whole image, sampled at the pixels' centres (detectron2's `paste_masks_in_image`).

    A mask is sampled bilinearly, with zeros around it. Each byte of the output is written once, nothing of
    the output's size is stored in between, and the host does not wait.

    Args:
        masks: (D, M, M) floating point, probabilities within the box.
        boxes: (D, 4) floating point xyxy in output pixels; what lies outside the image is cut off. A box
            without area, or one that is not finite, gives zeros.
        height, width: H and W of the output, in pixels.
        threshold: a pixel belongs to the object from this probability on; above 0, at most 1. The kernel is
            compiled for it.
        packed: give bits instead of bools.
        valid: (D,) bool; slots that are not valid give zeros. None: all are.

    Returns:
        (D, H, W) bool; if `packed`, (D, H, ceil(W / 8)) uint8, the first pixel in the highest bit, zeros in
        the bits that no pixel has (`numpy.unpackbits(..., axis=-1, count=W)` undoes it). Positions and
        values are float32, or float64 if masks or boxes are. There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or number is not as above.
    """
    check(masks, boxes, height, width, threshold, valid)
    paste = chosen("paste_masks", _paste_masks, cpu.paste_masks)
    return paste(masks.detach(), boxes.detach(), valid, height, width, threshold, packed)


@torch.library.custom_op(f"{NAMESPACE}::paste_masks", mutates_args=())
def _paste_masks(
    masks: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    packed: bool,
) -> Tensor:
    if runs_triton(masks):
        from . import kernel

        return kernel.paste_masks(masks, boxes, valid, height, width, threshold, packed)
    return cpu.paste_masks(masks, boxes, valid, height, width, threshold, packed)


@_paste_masks.register_fake
def _(
    masks: Tensor,
    boxes: Tensor,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    packed: bool,
) -> Tensor:
    columns = cpu.packed_width(width) if packed else width
    return masks.new_empty((masks.shape[0], height, columns), dtype=torch.uint8 if packed else torch.bool)
