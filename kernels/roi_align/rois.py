"""Where RoIs lie on the maps of a pyramid, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..common.pooling import Pooling
from ..level_assign import reference as level_assign


class Axis(NamedTuple):
    """RoIs along one axis, in pixels of their level."""

    start: Tensor  # (R,)
    bin: Tensor  # (R,) length of a bin
    size: Tensor  # (R,) int64, of the map


class Rois(NamedTuple):
    y: Axis
    x: Axis
    origin: Tensor  # (R,) int64, row of the map's first pixel in the table of all pixels
    real: Tensor  # (R,) bool


class OnLevel(NamedTuple):
    """The map of each box's level, whatever is pooled from it."""

    scale: Tensor  # (R,) pixels of the map per pixel of the image
    height: Tensor  # (R,) int64, of the map
    width: Tensor  # (R,) int64
    origin: Tensor  # (R,) int64, row of the map's first pixel in the table of all pixels
    real: Tensor  # (R,) bool, there is such a map, and the box is finite


def on_level(
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    how: Pooling,
) -> OnLevel:
    device, last = boxes.device, len(sizes) - 1
    level = level_assign.assign_levels(
        boxes, how.k_min, how.k_min + last, how.canonical_size, how.canonical_level
    ).long()
    height, width = torch.tensor(sizes, device=device).index_select(0, level).unbind(1)
    areas = [num_images * h * w for h, w in sizes]
    first = torch.tensor([sum(areas[:i]) for i in range(len(areas))], device=device).index_select(0, level)
    scale = torch.tensor(how.spatial_scales, dtype=boxes.dtype, device=device).index_select(0, level)
    if batch_index is None:
        batch_index = torch.arange(boxes.shape[0], device=device) // (boxes.shape[0] // num_images)
    if not batch_index.is_floating_point():
        batch_index = batch_index.long()  # a narrow one would wrap what it is compared with
    real = boxes.isfinite().all(dim=1) & (batch_index >= 0) & (batch_index < num_images)
    if valid is not None:
        real = real & valid
    origin = first + torch.where(real, batch_index, 0).long() * height * width
    return OnLevel(scale, height, width, origin, real)


def locate(
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    how: Pooling,
) -> Rois:
    """Where each box lies on the map of its level, as torchvision computes it."""
    scale, height, width, origin, real = on_level(boxes, batch_index, valid, num_images, sizes, how)
    boxes = torch.where(real[:, None], boxes, 0) * scale[:, None] - (0.5 if how.aligned else 0.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    if not how.aligned:
        sides = sides.clamp(min=1)
    oh, ow = how.output_size
    y = Axis(boxes[:, 1], sides[:, 1] / oh, height)
    x = Axis(boxes[:, 0], sides[:, 0] / ow, width)
    return Rois(y, x, origin, real)
