"""RoIAlign as CPU tensors run it, in plain PyTorch; `naive.py` says what it computes.

An output bin is the average of bilinear samples, so it is a weighted sum of the pixels it touches; and
since the samples form a grid, the weight of a pixel is the weight of its row times that of its column.
`entries.py` lists the (pixel, weight) entries of every bin. Forward sums pixels over the entries of a bin,
backward sums bins over the entries of a pixel, both with `embedding_bag` over rows of C channels. The
order of every sum is fixed, so results repeat bit for bit.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.library import sum_dtype
from ..common.pooling import Asked, Pooling
from .entries import Entries, entry_groups, transpose
from .rois import locate


def multilevel_roi_align(
    features: list[Tensor], boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, how: Pooling
) -> Tensor:
    """Pool every box from the level that FPN's rule gives it.

    Args:
        features: of each level, (N, C, Hl, Wl).
        boxes: (R, 4) xyxy in input pixels.
        batch_index: (R,) image of each box, of any dtype; None: each image has R / N boxes in turn.
        valid: (R,) bool; None: all.

    Returns:
        (R, C, oh, ow), zeros for boxes that are not valid, not finite, or of an image that is not there.
    """
    images, channels = features[0].shape[:2]
    dtype = sum_dtype(features[0])
    sizes = [(f.shape[2], f.shape[3]) for f in features]
    oh, ow = how.output_size
    out = torch.zeros((boxes.shape[0], oh * ow, channels), dtype=dtype, device=boxes.device)
    if out.numel() > 0 and images > 0:
        table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype) for f in features])
        rois = locate(boxes.to(dtype), batch_index, valid, images, sizes, how)
        for group, entries in entry_groups(rois, sizes, how):
            sums = _sum_rows(table, entries).view_as(out[group])
            real = rois.real[group, None, None]
            out[group] = torch.where(real, sums, 0)  # no weight times NaN would be NaN
    return out.view(boxes.shape[0], oh, ow, channels).permute(0, 3, 1, 2).to(features[0].dtype)


def multilevel_roi_align_backward(
    out_grads: list[Tensor], asked: list[Asked], num_images: int, sizes: list[tuple[int, int]]
) -> list[Tensor]:
    """Gradient with respect to the features of what was pooled of them, in one or several sets of RoIs.

    Args:
        out_grads: of each set, (R, C, oh, ow).
        sizes: height and width of each level.

    Returns:
        Of each level, (N, C, Hl, Wl) in the dtype of the gradients.
    """
    first = out_grads[0]
    table = _pixel_gradients(first, asked[0], num_images, sizes)
    for grad, one in zip(out_grads[1:], asked[1:], strict=True):
        table += _pixel_gradients(grad, one, num_images, sizes)
    rows = [num_images * height * width for height, width in sizes]
    return [
        part.view(num_images, height, width, first.shape[1]).permute(0, 3, 1, 2).to(first.dtype)
        for part, (height, width) in zip(table.split(rows), sizes, strict=True)
    ]


def _pixel_gradients(grad: Tensor, asked: Asked, num_images: int, sizes: list[tuple[int, int]]) -> Tensor:
    """(P, C) of all pixels of all levels, from one set."""
    boxes, batch_index, valid, how = asked
    channels = grad.shape[1]
    dtype = sum_dtype(grad)
    pixels = num_images * sum(height * width for height, width in sizes)
    table = torch.zeros((pixels, channels), dtype=dtype, device=grad.device)
    if grad.numel() > 0 and pixels > 0:
        rois = locate(boxes.to(dtype), batch_index, valid, num_images, sizes, how)
        bins = grad.permute(0, 2, 3, 1).reshape(boxes.shape[0], -1, channels).to(dtype)
        bins = torch.where(rois.real[:, None, None], bins, 0)  # NaN times no weight would be NaN
        for group, entries in entry_groups(rois, sizes, how):
            table += _sum_rows(bins[group].flatten(0, 1), transpose(entries, pixels))
    return table


def _sum_rows(table: Tensor, entries: Entries) -> Tensor:
    """(runs, C): the sum of weight * table[row] over the entries of each run."""
    offset = entries.offset
    if table.dtype == torch.float64:
        # Its float64 path does not stop at the last offset: what is left over gets a run of its own.
        offset = torch.cat([offset, offset.new_full((1,), entries.pixel.shape[0])])
    sums = F.embedding_bag(
        entries.pixel, table, offset, mode="sum", per_sample_weights=entries.weight, include_last_offset=True
    )
    return sums[: entries.offset.shape[0] - 1]
