"""What kernels of the step replaced, in plain PyTorch, for the rows of the ladder before them."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterator, Sequence
from unittest import mock

import torch
from torch import Tensor

from fastmrcnn.kernels.box_decode import reference as decoding
from fastmrcnn.kernels.matcher.op import BoxMatches
from fastmrcnn.model import matcher, rpn
from fastmrcnn.model.mask_head import MaskHead


def predict_all_classes(head: MaskHead) -> None:
    """Let a head that would compute the ground-truth class's mask alone compute those of all classes."""
    head.loss_of_rois = types.MethodType(MaskHead.loss_of_rois, head)  # type: ignore[method-assign]


@contextlib.contextmanager
def plain_boxes() -> Iterator[None]:
    """Proposals are decoded, and boxes matched, as a detector without kernels does it."""
    with (
        mock.patch.object(matcher, "match_boxes", match_boxes),
        mock.patch.object(rpn, "decode_boxes", decode_boxes),
    ):
        yield


def match_boxes(
    boxes: Tensor,
    gt_boxes: Tensor,
    gt_valid: Tensor,
    *,
    low_quality: bool = False,
    gt_crowd: Tensor | None = None,
    crowd_overlap: float | None = None,
) -> BoxMatches:
    """As the kernel of that name, by the matrix of all boxes and objects."""
    low = torch.maximum(boxes[:, :, None, :2], gt_boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], gt_boxes[:, None, :, 2:])
    inter = (high - low).clamp(min=0).prod(-1)  # (N, B, G)
    area, gt_area = ((box[..., 2] - box[..., 0]) * (box[..., 3] - box[..., 1]) for box in (boxes, gt_boxes))
    union = area[:, :, None] + gt_area[:, None, :] - inter
    overlap = torch.where(inter > 0, inter / union, 0.0)
    overlap = torch.where(gt_valid[:, None, :], overlap, -1.0)
    best, matched = overlap.max(-1)
    gt_best = is_best = in_crowd = None
    if low_quality:
        gt_best = overlap.amax(1)
        is_best = ((overlap == gt_best[:, None, :]) & (gt_best[:, None, :] > 0)).any(-1)
    if gt_crowd is not None and crowd_overlap is not None:
        inside = torch.where(inter > 0, inter / area[:, :, None], 0.0) >= crowd_overlap
        in_crowd = (inside & gt_crowd[:, None, :]).any(-1)
    return BoxMatches(best, matched, gt_best, is_best, in_crowd)


def decode_boxes(
    deltas: Tensor,
    references: Tensor,
    sizes: Tensor,
    *,
    scores: Tensor | None = None,
    weights: Sequence[float] = (1.0, 1.0, 1.0, 1.0),
    max_log_scale: float = decoding.MAX_LOG_SCALE,
    min_side: float | None = None,
    score_threshold: float | None = None,
) -> tuple[Tensor, Tensor]:
    """As the kernel of that name, one operation after the other."""
    return decoding.decode_boxes(
        deltas, references, sizes, scores, weights, max_log_scale, min_side, score_threshold
    )
