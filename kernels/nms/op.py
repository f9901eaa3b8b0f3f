"""Non-maximum suppression: public functions and their registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.checks import require, require_at_least
from ..common.library import register
from . import cpu


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    max_out: int,
) -> tuple[Tensor, Tensor]:
    """Greedy NMS of every image and group at once, with a fixed output and no host sync.

    A box is dropped if a better box of its own group that is not dropped overlaps it with an IoU above
    `iou_threshold`. Boxes of equal score stand in the order of their index, on every device. IoU is
    torchvision's, in float32 whatever the dtype of the boxes: inter / (area_a + area_b - inter). It is
    compared with `iou_threshold` in float64, on every device, as torchvision does on the CPU. (On CUDA,
    torchvision rounds the threshold to float32 first: there a box whose IoU is 0.6, as float32 has it,
    survives a threshold of 0.6, and here it does not.)

    Args:
        boxes: (N, P, 4) floating point, xyxy. Boxes that are not finite count as not valid.
        scores: (N, P) floating point, compared as given. NaN counts as not valid.
        groups: (N, P) integer, such as the level or class of each box; None: one group an image.
        valid: (N, P) bool, which slots are real; None: all.
        iou_threshold: at least 0; 1 and above drops nothing.
        max_out: how many of an image's survivors to return at most, over all of its groups.

    Returns:
        index: (N, max_out) int64 into P, by falling score; 0 in slots that are not valid.
        valid: (N, max_out) bool, true for the first slots, as many as there are survivors.

    Raises:
        ValueError: a shape, dtype or device is not as above, or a number is out of range.
    """
    require("boxes", boxes, ("N", "P", 4), "floating point")
    _check(boxes, scores, groups, valid, iou_threshold)
    require_at_least("max_out", max_out, 0)
    return _padded_nms(boxes.detach(), scores.detach(), groups, valid, iou_threshold, max_out)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy NMS, with the signature and result of torchvision.ops.nms.

    Args:
        boxes: (P, 4) floating point, xyxy. Compared in float32 whatever the dtype.
        scores: (P,) floating point.
        iou_threshold: at least 0.

    Returns:
        (kept,) int64, the indices of the survivors by falling score, equal scores by rising index. To
        learn how many they are takes one host sync; `padded_nms` needs none.

    Raises:
        ValueError: a shape, dtype or device is not as above, or iou_threshold is negative.
    """
    return batched_nms(boxes, scores, None, iou_threshold)


def batched_nms(boxes: Tensor, scores: Tensor, idxs: Tensor | None, iou_threshold: float) -> Tensor:
    """Greedy NMS within each category, with the signature and result of torchvision.ops.batched_nms.

    Categories are told apart by comparing them, never by moving the boxes, so large coordinates lose no
    precision.

    Args:
        boxes: (P, 4) floating point, xyxy. Compared in float32 whatever the dtype.
        scores: (P,) floating point.
        idxs: (P,) integer, the category of each box.
        iou_threshold: at least 0.

    Returns:
        (kept,) int64, as `nms`, over all categories.

    Raises:
        ValueError: as `nms`.
    """
    require("boxes", boxes, ("P", 4), "floating point")
    _check(boxes, scores, idxs, None, iou_threshold)
    return _nms(boxes.detach(), scores.detach(), idxs, iou_threshold)


def _check(
    boxes: Tensor, scores: Tensor, groups: Tensor | None, valid: Tensor | None, iou_threshold: float
) -> None:
    slots, like = tuple(boxes.shape[:-1]), ("boxes", boxes)
    require("scores", scores, slots, "floating point", like)
    require("groups", groups, slots, "integer", like)
    require("valid", valid, slots, torch.bool, like)
    require_at_least("iou_threshold", iou_threshold, 0)


_padded_nms = register(cpu.padded_nms)


@_padded_nms.register_fake
def _(boxes: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (boxes.shape[0], rest[-1])
    return boxes.new_empty(shape, dtype=torch.int64), boxes.new_empty(shape, dtype=torch.bool)


_nms = register(cpu.nms)


@_nms.register_fake
def _(boxes: Tensor, *rest: Any) -> Tensor:
    kept = torch.library.get_ctx().new_dynamic_size()
    return boxes.new_empty((kept,), dtype=torch.int64)
