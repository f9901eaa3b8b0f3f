"""Where RoIs lie on the maps of a pyramid, in PyTorch."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..level_assign import reference as level_assign


class Pooling(NamedTuple):
    """How to pool: what is not a tensor."""

    output_size: tuple[int, int]
    spatial_scales: list[float]  # of each level
    sampling_ratio: int  # samples per bin and axis; 0 or less: ceil(side of the bin)
    aligned: bool
    canonical_size: float
    canonical_level: int
    k_min: int


def is_channels_last(feature: Tensor) -> bool:
    return not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


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


def locate(
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    how: Pooling,
) -> Rois:
    """Where each box lies on the map of its level, as torchvision computes it."""
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
    real = boxes.isfinite().all(dim=1) & (batch_index >= 0) & (batch_index < num_images)
    if valid is not None:
        real = real & valid
    boxes = torch.where(real[:, None], boxes, 0) * scale[:, None] - (0.5 if how.aligned else 0.0)
    sides = boxes[:, 2:] - boxes[:, :2]
    if not how.aligned:
        sides = sides.clamp(min=1)
    oh, ow = how.output_size
    return Rois(
        Axis(boxes[:, 1], sides[:, 1] / oh, height),
        Axis(boxes[:, 0], sides[:, 0] / ow, width),
        first + torch.where(real, batch_index, 0).long() * height * width,
        real,
    )
