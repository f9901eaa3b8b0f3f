"""Where RoIs lie on the maps of a pyramid, in PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

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

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Pooling:
        """Back from an operator's arguments."""
        output_size, spatial_scales, *rest = arguments
        return cls(tuple(output_size), list(spatial_scales), *rest)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As operators take it, by POOLING_SCHEMA: those have lists, no tuples."""
        return list(self.output_size), *self[1:]


POOLING_SCHEMA = (
    "SymInt[] output_size, float[] spatial_scales, SymInt sampling_ratio, bool aligned, "
    "float canonical_size, SymInt canonical_level, SymInt k_min"
)


class Maps(NamedTuple):
    """The maps of a pyramid, all but their values, as the operators for gradients take them."""

    num_images: int
    heights: Sequence[int]  # of each level
    widths: Sequence[int]
    channels_last: bool

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> Maps:
        first = features[0]
        heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
        return cls(first.shape[0], heights, widths, is_channels_last(first))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(zip(self.heights, self.widths, strict=True))


MAPS_SCHEMA = "SymInt num_images, SymInt[] heights, SymInt[] widths, bool channels_last"


def is_channels_last(feature: Tensor) -> bool:
    return not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_pooled(
    features: Sequence[Tensor], rois: int, output_size: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """(R, C, oh, ow), channels_last if the first map is; the dtype is that of the maps unless given."""
    first = features[0]
    return torch.empty(
        (rois, first.shape[1], *output_size),
        dtype=dtype or first.dtype,
        device=first.device,
        memory_format=memory_format(is_channels_last(first)),
    )


def empty_maps(
    grad: Tensor, num_images: int, sizes: Sequence[tuple[int, int]], channels_last: bool
) -> list[Tensor]:
    """Of each level, (N, C, Hl, Wl) for gradients of what was pooled to `grad`, (R, C, oh, ow)."""
    return [
        torch.empty(
            (num_images, grad.shape[1], *size),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=memory_format(channels_last),
        )
        for size in sizes
    ]


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


def sum_dtype(dtype: torch.dtype) -> torch.dtype:
    """Of positions and sums, by the dtype of the features."""
    return torch.float64 if dtype == torch.float64 else torch.float32
