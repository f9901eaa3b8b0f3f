"""Run lengths of pasted masks in PyTorch, by way of the bitmaps; what CPU tensors run.

Shapes depend on the data here, so this runs inside an operator and is never traced.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..mask_paste import cpu as paste


def mask_rle(
    masks: Tensor,
    boxes: Tensor,
    sizes: Tensor | None,
    valid: Tensor | None,
    height: int,
    width: int,
    threshold: float,
    max_runs: int,
) -> tuple[Tensor, Tensor]:
    """See `op.mask_rle`. An object at a time, which bounds the memory."""
    runs = torch.zeros((len(masks), max_runs), dtype=torch.int32, device=masks.device)
    count = torch.zeros((len(masks),), dtype=torch.int32, device=masks.device)
    for index in range(len(masks)):
        one = slice(index, index + 1)
        valid_one = None if valid is None else valid[one]
        bitmap = paste.paste_masks(masks[one], boxes[one], valid_one, height, width, threshold, False)[0]
        if sizes is not None:
            own_height, own_width = sizes[index].long().clamp(min=0).tolist()
            bitmap = bitmap[:own_height, :own_width]
        found = run_lengths(bitmap)
        count[index] = len(found)
        runs[index, : len(found)] = found[:max_runs]
    return runs, count


def run_lengths(bitmap: Tensor) -> Tensor:
    """(runs,) int64 of zeros and ones in turn, column by column, zeros first."""
    line = bitmap.T.flatten()
    before = torch.cat((line.new_zeros(1), line[:-1])) if len(line) else line
    (edges,) = torch.where(line != before)
    ends = torch.cat((edges, edges.new_tensor([len(line)])))
    return ends.diff(prepend=ends.new_zeros(1))
