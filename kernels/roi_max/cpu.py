"""The largest value of each bin as CPU tensors run it, in plain PyTorch; `naive.py` says what it computes.

Every bin has points along both axes: the pixels of its window (pool), or a grid of bilinear samples (warp,
align). All points of all bins are listed, one after another in row-major order; a bin takes the largest
value, and of equal ones the first. What won is kept as (y << 16) | x, the numbers of the pixel or of the
sample within its bin, and -1 stands for None: then nothing of the map has a part in the result.

No shape depends on data and nothing is read back. The number of points is known on the device only, so
the list has room for the most there can be, and what is left over belongs to no bin.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..common.library import sum_dtype
from ..common.pooling import Pooling
from .points import Bins, Point, Rois, Windows, locate, most_points, point_at

MAX_VALUES = 1 << 24
"""RoIs are taken in groups whose points times channels do not exceed this, to bound the memory."""


def multilevel_roi_max(
    features: list[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    how: Pooling,
) -> tuple[Tensor, Tensor]:
    """Pool every box from the level that FPN's rule gives it.

    Args:
        features: of each level, (N, C, Hl, Wl).
        boxes: (R, 4) xyxy in input pixels.
        batch_index: (R,) image of each box, of any dtype; None: each image has R / N boxes in turn.
        valid: (R,) bool; None: all.
        kind: pool | warp | align.

    Returns:
        out: (R, C, oh, ow), zeros for boxes that are not valid, not finite, or of an image that is not
            there, and for bins without a point.
        winner: (R, C, oh, ow) int32, as above.
    """
    images, channels = features[0].shape[:2]
    dtype = sum_dtype(features[0])
    sizes = [(f.shape[2], f.shape[3]) for f in features]
    oh, ow = how.output_size
    out = torch.zeros((boxes.shape[0], oh * ow, channels), dtype=dtype, device=boxes.device)
    winner = torch.full(out.shape, -1, dtype=torch.int32, device=boxes.device)
    if out.numel() > 0 and images > 0:
        table = torch.cat([f.permute(0, 2, 3, 1).reshape(-1, channels).to(dtype) for f in features])
        rois = locate(boxes.to(dtype), batch_index, valid, images, sizes, kind, how)
        most = most_points(sizes, kind, how)
        step = max(1, MAX_VALUES // (channels * most))
        for begin in range(0, boxes.shape[0], step):
            group = slice(begin, begin + step)
            values, code = _largest(table, rois.part(group), most, kind, how)
            out[group], winner[group] = values.view_as(out[group]), code.view_as(out[group])
    shape = (boxes.shape[0], oh, ow, channels)
    return out.view(shape).permute(0, 3, 1, 2).to(features[0].dtype), winner.view(shape).permute(0, 3, 1, 2)


def multilevel_roi_max_backward(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    kind: str,
    how: Pooling,
) -> list[Tensor]:
    """Gradient of `multilevel_roi_max` with respect to the features: to what won, and its corners.

    Args:
        grad: (R, C, oh, ow).
        winner: (R, C, oh, ow) int32.
        sizes: height and width of each level.

    Returns:
        Of each level, (N, C, Hl, Wl) in the dtype of `grad`.
    """
    count, channels, oh, ow = grad.shape
    dtype = sum_dtype(grad)
    pixels = num_images * sum(height * width for height, width in sizes)
    table = torch.zeros((pixels, channels), dtype=dtype, device=grad.device)
    if grad.numel() > 0 and pixels > 0:
        rois = locate(boxes.to(dtype), batch_index, None, num_images, sizes, kind, how)
        flat = (count * oh * ow, channels)
        won = winner.permute(0, 2, 3, 1).reshape(flat)
        share = torch.where(won >= 0, grad.permute(0, 2, 3, 1).reshape(flat).to(dtype), 0)
        won = won.clamp(min=0)
        bins = Bins.of(torch.arange(flat[0], device=grad.device)[:, None], how)
        at = point_at(rois, bins, won >> 16, won & 0xFFFF, kind)
        weights = [a * b for a in (1 - at.down, at.down) for b in (1 - at.over, at.over)]
        for pixel, weight in zip(at.pixels, weights, strict=False):  # one pixel, or four corners
            table.scatter_add_(0, pixel, share * weight)
    rows = [num_images * height * width for height, width in sizes]
    return [
        part.view(num_images, height, width, channels).permute(0, 3, 1, 2).to(grad.dtype)
        for part, (height, width) in zip(table.split(rows), sizes, strict=True)
    ]


def _largest(table: Tensor, rois: Rois, most: int, kind: str, how: Pooling) -> tuple[Tensor, Tensor]:
    """(R * oh * ow, C): the largest value of each bin, and what won."""
    windows = Windows.of(rois, kind, how)
    points = windows.points * rois.real[:, None, None]
    # Sides beyond about 1e6 pixels are too coarse in float32 for the bound to hold: leave such a box out.
    points = (points * (points.sum((1, 2), keepdim=True) <= most)).flatten()

    # A list of all points: the bin that owns each, and the place it has there. Nobody owns what is left over.
    room, nobody = rois.real.shape[0] * most, points.shape[0]
    runs = torch.cat([points, room - points.sum().reshape(1)])
    owner = torch.repeat_interleave(runs, output_size=room)
    place = torch.arange(room, device=owner.device) - (runs.cumsum(0) - runs).index_select(0, owner)
    place = torch.where(owner < nobody, place, 0)
    bins = Bins.of(owner.clamp(max=nobody - 1), how)
    values = _values(table, point_at(rois, bins, *windows.number(bins, place), kind))

    shape = (nobody + 1, table.shape[1])
    index = owner[:, None].expand_as(values)
    largest = values.new_full(shape, -math.inf).scatter_reduce_(0, index, values, "amax")
    wins = (values == largest.index_select(0, owner)) | values.isnan()
    first = torch.full(shape, room, device=owner.device)
    first.scatter_reduce_(0, index, torch.where(wins, place[:, None], room), "amin")

    some = (points > 0)[:, None]
    bins = Bins.of(torch.arange(nobody, device=owner.device)[:, None], how)
    y, x = windows.number(bins, torch.where(some, first[:-1], 0))
    on_map = point_at(rois, bins, y, x, kind).on_map
    return torch.where(some, largest[:-1], 0), torch.where(some & on_map, (y << 16) | x, -1).int()


def _values(table: Tensor, at: Point) -> Tensor:
    """(T, C) of (T,) points; zeros off the map. Equal corners give their value exactly: ties stay ties."""
    corners = [table.index_select(0, pixel) for pixel in at.pixels]
    if len(corners) == 1:
        return corners[0]
    down, over = at.down[:, None], at.over[:, None]
    top, bottom = (left + (right - left) * over for left, right in (corners[:2], corners[2:]))
    return torch.where(at.on_map[:, None], top + (bottom - top) * down, 0)
