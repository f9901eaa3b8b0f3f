"""Greedy non-maximum suppression as CPU tensors run it, in PyTorch; `naive.py` is the textbook loop.

The result is that of the textbook loop (take the best box left, drop what overlaps it, repeat). It is
reached blockwise: the boxes are ordered by group and falling score, the order within a block of boxes
is resolved one by one, and only the block's survivors meet the boxes behind it. Shapes depend on the
data here, so this runs inside an operator and is never traced.
"""

from __future__ import annotations

import ctypes
import struct

import torch
from torch import Tensor

BLOCK = 256  # boxes resolved one by one, by bit masks
TILE = 8192  # columns compared at once, which bounds the memory


def padded_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    max_out: int,
) -> tuple[Tensor, Tensor]:
    """See `op.padded_nms`."""
    num_images = boxes.shape[0]
    boxes = boxes.float()
    usable = boxes.isfinite().all(-1) & ~scores.isnan()
    if valid is not None:
        usable = usable & valid
    index = boxes.new_zeros((num_images, max_out), dtype=torch.int64)
    kept_valid = boxes.new_zeros((num_images, max_out), dtype=torch.bool)
    for image in range(num_images):
        order = scores[image].argsort(stable=True, descending=True)
        order = order[usable[image][order]]
        kept = keep_best(
            boxes[image], None if groups is None else groups[image], order, iou_threshold, max_out
        )
        index[image, : kept.numel()] = kept
        kept_valid[image, : kept.numel()] = True
    return index, kept_valid


def nms(boxes: Tensor, scores: Tensor, groups: Tensor | None, iou_threshold: float) -> Tensor:
    """See `op.nms` and `op.batched_nms`."""
    order = scores.argsort(stable=True, descending=True)
    return keep_best(boxes.float(), groups, order, iou_threshold, boxes.shape[0])


def keep_best(
    boxes: Tensor, groups: Tensor | None, order: Tensor, iou_threshold: float, max_out: int
) -> Tensor:
    """The first `max_out` survivors of one image, by falling score.

    Candidates enter best first, in portions that double: those that come after the last survivor
    asked for cannot change the result.

    Args:
        boxes: (P, 4) fp32 xyxy.
        groups: (P,) int; boxes of different groups do not meet. None: one group.
        order: (C,) int64, candidates by falling score.
    Returns:
        (up to max_out,) int64, indices into boxes.
    """
    threshold = round_down_to_float32(iou_threshold)
    kept = order[:0]
    portion = max(2 * max_out, 2 * BLOCK)
    start = 0
    while start < order.numel() and kept.numel() < max_out:
        kept = torch.cat([kept, order[start : start + portion]])
        kept = kept[_survivors(boxes[kept], None if groups is None else groups[kept], threshold)]
        start += portion
        portion *= 2
    return kept[:max_out]


def _survivors(boxes: Tensor, groups: Tensor | None, threshold: float) -> Tensor:
    """Rising positions of the survivors among boxes (C, 4) that stand by falling score."""
    if groups is None:
        alive = torch.arange(boxes.shape[0], device=boxes.device)
    else:
        groups, alive = groups.sort(stable=True)
        boxes = boxes[alive]
    # From here on the boxes stand by group, then by falling score; `left` are those not yet dropped.
    left = torch.arange(boxes.shape[0], device=boxes.device)
    kept = []
    while left.numel():
        head, left = left[:BLOCK], left[BLOCK:]
        head_boxes = boxes[head]
        overlaps = overlap(head_boxes, head_boxes, threshold)
        if groups is not None:
            overlaps &= groups[head, None] == groups[head]
        head = head[_resolve(overlaps)]
        kept.append(head)
        # Of the boxes behind the block only those of its last group can overlap its survivors.
        if groups is not None:
            last = groups[head[-1]]
            head = head[groups[head] == last]
            behind = left[: int((groups[left] == last).sum())]
        else:
            behind = left
        if behind.numel():
            rows = boxes[head]
            tiles = [~overlap(rows, boxes[tile], threshold).any(0) for tile in behind.split(TILE)]
            left = torch.cat([behind[torch.cat(tiles)], left[behind.numel() :]])
    return alive[torch.cat(kept)].sort().values if kept else alive


def overlap(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """(R, C) bool, IoU of (R, 4) and (C, 4) fp32 boxes above the threshold, in torchvision's arithmetic.

    Boxes are not mended first: an inverted one has the area that the formula gives it. 0 / 0 is NaN,
    which is not above anything, so empty boxes drop nothing and stay.
    """
    r1, r2, r3, r4 = rows[:, :, None].unbind(1)
    c1, c2, c3, c4 = columns.unbind(1)
    row_area = (r3 - r1) * (r4 - r2)
    column_area = (c3 - c1) * (c4 - c2)
    width = torch.minimum(r3, c3).sub_(torch.maximum(r1, c1)).clamp_(min=0)
    inter = torch.minimum(r4, c4).sub_(torch.maximum(r2, c2)).clamp_(min=0).mul_(width)
    union = torch.add(row_area, column_area, out=width).sub_(inter)
    return inter.div_(union) > threshold


def _resolve(overlaps: Tensor) -> Tensor:
    """Rising positions of the survivors of a block, given which boxes overlap, best first.

    Each row of the (B, B) bool matrix is read as one big integer of B bytes, so that to drop what a
    survivor overlaps is a single OR.
    """
    size = overlaps.shape[0]
    overlaps = overlaps.contiguous()
    rows = ctypes.string_at(overlaps.data_ptr(), size * size)
    kept = []
    dropped = 0
    for position in range(size):
        if not dropped >> (8 * position) & 1:
            kept.append(position)
            dropped |= int.from_bytes(rows[position * size : (position + 1) * size], "little")
    return torch.tensor(kept, dtype=torch.int64, device=overlaps.device)


def round_down_to_float32(value: float) -> float:
    """The largest float32 not above `value`, which is at least 0.

    torchvision compares a float32 IoU with a float64 threshold on the CPU; IoU > threshold in float64
    is the same as IoU > round_down_to_float32(threshold) in float32.
    """
    value = min(value, 3e38)
    (rounded,) = struct.unpack("f", struct.pack("f", value))
    if rounded > value:
        (bits,) = struct.unpack("i", struct.pack("f", value))
        (rounded,) = struct.unpack("f", struct.pack("i", bits - 1))
    return float(rounded)
