"""Matching of boxes to objects: the public function and its registration."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._library import NAMESPACE, chosen, runs_triton, switchable
from . import cpu, naive


class BoxMatches(NamedTuple):
    """What `match_boxes` returns. What was not asked for is None."""

    best: Tensor  # (N, B) float32, the highest IoU of the box with an object; -1 if the image has none
    matched: Tensor  # (N, B) int64, the object's slot, the first of several; 0 if the image has none
    gt_best: Tensor | None  # (N, G) float32, the highest IoU of the object with a box; -1 if not valid
    is_best: Tensor | None  # (N, B) bool, the box has the highest IoU of some object, and it is above 0
    in_crowd: Tensor | None  # (N, B) bool, enough of the box lies in a crowd region


@switchable
def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    low_quality: bool = False,
    gt_crowd: Tensor | None = None,
    crowd_overlap: float | None = None,
) -> BoxMatches:
    """The object that each box overlaps most, without a matrix of all boxes and objects.

    IoU is torchvision's and detectron2's, inter / (area_a + area_b - inter), in float32 whatever the dtype
    of the boxes; 0 where two boxes do not touch. Every device gives the same bits, and ties go to the
    first object, so that `is_best` is exact. Memory grows with boxes and objects, not with their product.

    Args:
        boxes: (N, B, 4) floating point xyxy, or (1, B, 4) shared by all images, such as anchors. A box
            with a NaN touches nothing, nor does an inverted one. IoU is NaN where an intersection is
            infinite; NaN counts as the highest, and as no one's best.
        gt_boxes: (N, G, 4) floating point xyxy.
        gt_valid: (N, G) bool, which slots have an object. What stands in the others does not matter.
        low_quality: return `gt_best` and `is_best` too (Faster R-CNN's low-quality matches, arXiv
            1506.01497: every box of the highest overlap with an object, however low).
        gt_crowd: (N, G) bool, slots with a crowd region, valid or not; return `in_crowd` too.
        crowd_overlap: share of a box's area, above 0, that must lie in one crowd region.

    Returns:
        BoxMatches. There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or number is not as above, or only one of gt_crowd and
            crowd_overlap is given.
    """
    _check(boxes, gt_boxes, gt_valid, gt_crowd)
    if (gt_crowd is None) != (crowd_overlap is None):
        raise ValueError("gt_crowd and crowd_overlap belong together, got only one of them")
    if crowd_overlap is not None and not crowd_overlap > 0:
        raise ValueError(f"crowd_overlap must be above 0, got {crowd_overlap}")
    match = chosen("match_boxes", _match_boxes, _plain)
    best, index, gt_best, is_best, in_crowd = match(
        boxes.detach(), gt_boxes.detach(), gt_valid, gt_crowd, low_quality, float(crowd_overlap or 0)
    )
    return BoxMatches(
        best,
        index,
        gt_best if low_quality else None,
        is_best if low_quality else None,
        None if gt_crowd is None else in_crowd,
    )


def _check(boxes: Tensor, gt_boxes: Tensor, gt_valid: Tensor, gt_crowd: Tensor | None) -> None:
    if gt_boxes.ndim != 3 or gt_boxes.shape[2] != 4:
        raise ValueError(f"gt_boxes must be (N, G, 4), got {tuple(gt_boxes.shape)}")
    images, objects = gt_boxes.shape[:2]
    if boxes.ndim != 3 or boxes.shape[2] != 4 or boxes.shape[0] not in (1, images):
        raise ValueError(f"boxes must be ({images}, B, 4) or (1, B, 4), got {tuple(boxes.shape)}")
    flags = {"gt_valid": gt_valid} if gt_crowd is None else {"gt_valid": gt_valid, "gt_crowd": gt_crowd}
    for name, flag in flags.items():
        if tuple(flag.shape) != (images, objects):
            raise ValueError(f"{name} must be {(images, objects)}, got {tuple(flag.shape)}")
        if flag.dtype != torch.bool:
            raise ValueError(f"{name} must be bool, got {flag.dtype}")
    for name, tensor in (("boxes", boxes), ("gt_boxes", gt_boxes)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    for name, tensor in (("gt_boxes", gt_boxes), *flags.items()):
        if tensor.device != boxes.device:
            raise ValueError(f"{name} must be on {boxes.device} as boxes are, got {tensor.device}")


def _plain(boxes: Tensor, gt_boxes: Tensor, *rest: Any) -> tuple[Tensor | None, ...]:
    return naive.match_boxes(boxes.float(), gt_boxes.float(), *rest)


@torch.library.custom_op(f"{NAMESPACE}::match_boxes", mutates_args=())
def _match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    if runs_triton(boxes):
        from . import kernel

        return kernel.match_boxes(boxes, gt_boxes, gt_valid, gt_crowd, low_quality, crowd_overlap)
    return cpu.match_boxes(boxes, gt_boxes, gt_valid, gt_crowd, low_quality, crowd_overlap)


@_match_boxes.register_fake
def _(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    gt_crowd: Tensor | None,
    low_quality: bool,
    crowd_overlap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    slots = (gt_boxes.shape[0], boxes.shape[1])
    return (
        boxes.new_empty(slots, dtype=torch.float32),
        boxes.new_empty(slots, dtype=torch.int64),
        boxes.new_empty(gt_valid.shape if low_quality else (0,), dtype=torch.float32),
        boxes.new_empty(slots if low_quality else (0,), dtype=torch.bool),
        boxes.new_empty((0,) if gt_crowd is None else slots, dtype=torch.bool),
    )
