"""Non-maximum suppression in PyTorch's own operators, of fixed shapes, for graphs that are exported.

The result is that of `kernels.padded_nms`, index by index. Its CPU code reads data to know what is left to
compare, which no graph can. Here a loop within the graph takes a block of the best boxes left, drops what
a survivor so far overlaps, and settles the order within the block. Only survivors up to the number asked for
are kept, so that the memory does not grow with the square of the boxes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastmrcnn.kernels.nms.cpu import round_down_to_float32

BLOCK = 256  # boxes of an image that a round of the loop looks at
REPEATS = 8  # of the step that settles a block


def loop_nms(
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor | None,
    valid: Tensor | None,
    iou_threshold: float,
    max_out: int,
) -> tuple[Tensor, Tensor]:
    """See `kernels.padded_nms`: index and valid, both (N, max_out)."""
    images, slots = scores.shape
    boxes = boxes.float()
    groups = torch.zeros_like(scores, dtype=torch.int64) if groups is None else groups.long()
    usable = boxes.isfinite().all(-1) & ~scores.isnan()
    if valid is not None:
        usable = usable & valid
    order = scores.sort(dim=1, stable=True, descending=True).indices
    usable = usable.gather(1, order)
    # The usable ones alone by falling score; the others are written to a place behind all.
    place = torch.where(usable, usable.cumsum(1) - 1, slots)
    ranked = order.new_zeros((images, slots + 1)).scatter(1, place, order)
    threshold = round_down_to_float32(iou_threshold)

    def goes_on(begin: Tensor, count: Tensor, kept: Tensor, total: Tensor, *_: Tensor) -> Tensor:
        return ((begin < total) & (count < max_out)).any()

    def take_block(
        begin: Tensor,  # (N,) int64, the next of `ranked` to be looked at
        count: Tensor,  # (N,) int64, survivors so far
        kept: Tensor,  # (N, max_out + 1) int64, which they are; the last place takes what nobody wants
        total: Tensor,
        ranked: Tensor,
        boxes: Tensor,
        groups: Tensor,
        lane: Tensor,  # (block,) 0, 1, ...
        slot: Tensor,  # (max_out,) 0, 1, ...
    ) -> tuple[Tensor, Tensor, Tensor]:
        at = begin[:, None] + lane
        index = ranked.gather(1, at.clamp(max=slots))
        own, group = _rows(boxes, index), groups.gather(1, index)
        before = kept[:, :max_out]
        over = _overlap(_rows(boxes, before), own, threshold)
        over = over & (groups.gather(1, before)[:, :, None] == group[:, None, :])
        over = over & (slot < count[:, None])[:, :, None]
        candidates = (at < total[:, None]) & ~over.any(1)

        # A box survives if no survivor before it overlaps it. Each time that this is repeated, from any
        # guess, one box more is settled at least: all before the first that changed, and that one.
        within = _overlap(own, own, threshold) & (group[:, :, None] == group[:, None, :])
        within = within & (lane[:, None] < lane)
        survivors = before_that = candidates
        for _ in range(REPEATS):
            before_that, survivors = survivors, candidates & ~(within & survivors[:, :, None]).any(1)
        settled = torch.where(survivors != before_that, lane, lane.shape[0] - 1).amin(1) + 1
        taken = survivors & (lane < settled[:, None])
        to = torch.where(taken, count[:, None] + taken.cumsum(1) - 1, max_out).clamp(max=max_out)
        kept = kept.scatter(1, to, index)
        return begin + settled, (count + taken.sum(1)).clamp(max=max_out), kept

    device = boxes.device
    carried = (
        torch.zeros((images,), dtype=torch.int64, device=device),
        torch.zeros((images,), dtype=torch.int64, device=device),
        torch.zeros((images, max_out + 1), dtype=torch.int64, device=device),
    )
    # All tensors that the loop reads are among its arguments: it would take others for constants.
    read = (
        usable.sum(1),
        ranked,
        boxes,
        groups,
        torch.arange(min(BLOCK, max(slots, 1)), device=device),
        torch.arange(max_out, device=device),
    )
    # The operator itself: torch.while_loop would compile these functions, which the exporter traces anyway.
    _, count, kept = torch.ops.higher_order.while_loop(goes_on, take_block, carried, read)
    real = read[-1] < count[:, None]
    return torch.where(real, kept[:, :max_out], 0), real


def _rows(boxes: Tensor, index: Tensor) -> Tensor:
    """(N, B, 4) of boxes (N, P, 4) and index (N, B)."""
    return boxes.gather(1, index[:, :, None].expand(-1, -1, 4))


def _overlap(rows: Tensor, columns: Tensor, threshold: float) -> Tensor:
    """(N, R, B) bool: IoU of (N, R, 4) and (N, B, 4) above the threshold, as `kernels.nms.cpu.overlap`."""
    r1, r2, r3, r4 = rows[:, :, None].unbind(-1)
    c1, c2, c3, c4 = columns[:, None].unbind(-1)
    row_area, column_area = (r3 - r1) * (r4 - r2), (c3 - c1) * (c4 - c2)
    width = (torch.minimum(r3, c3) - torch.maximum(r1, c1)).clamp(min=0)
    height = (torch.minimum(r4, c4) - torch.maximum(r2, c2)).clamp(min=0)
    inter = height * width
    return inter / (row_area + column_area - inter) > threshold
