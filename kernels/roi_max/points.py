"""Where RoIs and the points of their bins lie on the maps of a pyramid, in PyTorch."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..common.pooling import Pooling
from ..level_assign import reference as level_assign
from ..roi_align.rois import on_level

MOST_SAMPLES = 32767  # of a bin along an axis, so that two of their numbers fit into an int32


class Axis(NamedTuple):
    """RoIs along one axis, in pixels of their level; pixel 0 is at 0."""

    start: Tensor  # (R,)
    bin: Tensor  # (R,) length of a bin
    samples: Tensor  # (R,) in a bin, of the dtype of the others
    size: Tensor  # (R,) int64, of the map


class Rois(NamedTuple):
    y: Axis
    x: Axis
    origin: Tensor  # (R,) int64, row of the map's first pixel in the table of all pixels
    real: Tensor  # (R,) bool

    def part(self, group: slice) -> Rois:
        y, x = (Axis(*(t[group] for t in axis)) for axis in (self.y, self.x))
        return Rois(y, x, self.origin[group], self.real[group])


class Bins(NamedTuple):
    """Some bins, of one shape."""

    roi: Tensor
    i: Tensor
    j: Tensor

    @staticmethod
    def of(flat: Tensor, how: Pooling) -> Bins:
        """Those that are `flat`-th when all bins of all RoIs are counted."""
        oh, ow = how.output_size
        return Bins(flat // (oh * ow), flat // ow % oh, flat % ow)


class Windows(NamedTuple):
    """Of each bin, the rectangle of the points that matter: (R, oh) and (R, ow) int64."""

    top: Tensor
    bottom: Tensor  # end, as is right
    left: Tensor
    right: Tensor

    @staticmethod
    def of(rois: Rois, kind: str, how: Pooling) -> Windows:
        oh, ow = how.output_size
        return Windows(*_window(rois.y, oh, kind), *_window(rois.x, ow, kind))

    @property
    def points(self) -> Tensor:
        """(R, oh, ow), how many there are."""
        return (self.bottom - self.top)[:, :, None] * (self.right - self.left)[:, None, :]

    def number(self, bins: Bins, place: Tensor) -> tuple[Tensor, Tensor]:
        """y and x of the point that is `place`-th of its bin, in row-major order."""
        roi, i, j = bins
        left = self.left[roi, j]
        columns = (self.right[roi, j] - left).clamp(min=1)
        return self.top[roi, i] + place // columns, left + place % columns


class Point(NamedTuple):
    """Of one shape, or of shapes that broadcast."""

    pixels: list[Tensor]  # rows in the table of all pixels: the one, or the four corners in row-major order
    down: Tensor  # share of the lower two
    over: Tensor  # share of the right two
    on_map: Tensor  # bool


def locate(
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    sizes: list[tuple[int, int]],
    kind: str,
    how: Pooling,
) -> Rois:
    """Where each box lies on the map of its level."""
    scale, height, width, origin, real = on_level(boxes, batch_index, valid, num_images, sizes, how)
    boxes = torch.where(real[:, None], boxes, 0) * scale[:, None]
    if kind == "align":
        low = boxes[:, :2] - (0.5 if how.aligned else 0.0)
        sides = boxes[:, 2:] - (0.5 if how.aligned else 0.0) - low
        sides = sides if how.aligned else sides.clamp(min=1)
    else:
        low, sides = quantise(boxes)
        low = low - (0.5 if kind == "warp" else 0.0)
    real = real & sides.isfinite().all(dim=1)  # sides of 1e38 pixels overflow
    low, sides = torch.where(real[:, None], low, 0), torch.where(real[:, None], sides, 1)
    lengths = sides / torch.tensor(how.output_size[::-1], device=boxes.device)
    samples = lengths.ceil() if how.sampling_ratio == 0 else torch.full_like(lengths, how.sampling_ratio)
    samples = samples.clamp(0, MOST_SAMPLES)
    return Rois(
        Axis(low[:, 1], lengths[:, 1], samples[:, 1], height),
        Axis(low[:, 0], lengths[:, 0], samples[:, 0], width),
        origin,
        real,
    )


def quantise(boxes: Tensor) -> tuple[Tensor, Tensor]:
    """First pixel and sides in pixels of boxes in pixels of the map, both (..., 2), as RoIPool rounds them.

    Halves are rounded away from zero; the last pixel belongs to the box, which has at least one.
    """
    whole = boxes.abs().floor()
    whole = (whole + (boxes.abs() >= whole + 0.5)).copysign(boxes)
    return whole[..., :2], (whole[..., 2:] - whole[..., :2] + 1).clamp(min=1)


def _window(axis: Axis, bins: int, kind: str) -> tuple[Tensor, Tensor]:
    """First and end of the points of each bin that matter, (R, bins) int64.

    For pool, the pixels of the map. Samples off the map are zeros: of those at either side of the map at
    least one is kept, if there is any, so that order and result are those of all.
    """
    place = torch.arange(bins, device=axis.start.device)
    start, length, size = axis.start[:, None], axis.bin[:, None], axis.size[:, None]
    if kind == "pool":
        first, end, limit = start + (place * length).floor(), start + ((place + 1) * length).ceil(), size
    else:
        limit = axis.samples[:, None]
        step = length / limit.clamp(min=1)
        begin = start + place * length
        ordered = step > 0  # inverted boxes: all samples
        step = torch.where(ordered, step, 1)
        first = torch.where(ordered, ((-1 - begin) / step - 0.5).floor() - 1, 0)
        end = torch.where(ordered, ((size - begin) / step - 0.5).ceil() + 2, limit)
    limit = limit.to(start.dtype)
    first, end = (torch.minimum(t.clamp(min=0), limit).long() for t in (first, end))
    return first, torch.maximum(first, end)


def point_at(rois: Rois, bins: Bins, y: Tensor, x: Tensor, kind: str) -> Point:
    """Where point (y, x) of a bin lies. Bins and points broadcast against each other."""
    roi, i, j = bins
    width, origin = rois.x.size[roi], rois.origin[roi]
    if kind == "pool":
        y, x = (torch.minimum(k.clamp(min=0), a.size[roi] - 1) for k, a in ((y, rois.y), (x, rois.x)))
        pixel = origin + y * width + x
        nothing = rois.y.start.new_zeros(())
        return Point([pixel], nothing, nothing, torch.ones_like(pixel, dtype=torch.bool))
    top, bottom, down, on_y = _lines(rois.y, roi, i, y)
    left, right, over, on_x = _lines(rois.x, roi, j, x)
    pixels = [origin + row * width + column for row in (top, bottom) for column in (left, right)]
    return Point(pixels, down, over, on_y & on_x)


def _lines(axis: Axis, roi: Tensor, place: Tensor, sample: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The two lines about a sample, the share of the second, and whether the sample is on the map."""
    length, size = axis.bin[roi], axis.size[roi]
    step = length / axis.samples[roi].clamp(min=1)
    at = axis.start[roi] + place * length + (sample + 0.5) * step
    on_map = (at >= -1) & (at <= size)
    at = torch.minimum(at.clamp(min=0), (size - 1).to(at.dtype))
    low = at.floor().long()
    return low, torch.minimum(low + 1, size - 1), at - low, on_map


def most_points(sizes: list[tuple[int, int]], kind: str, how: Pooling) -> int:
    """Most points that one box can have.

    A box that is not on the coarsest level has less area than that level takes, which bounds height times
    width, whatever its shape.
    """
    oh, ow = how.output_size
    if kind != "pool" and how.sampling_ratio > 0:
        return oh * ow * how.sampling_ratio**2
    most = 1
    for level, (height, width) in enumerate(sizes):
        most_y, most_x = _most_lines(height, oh, kind), _most_lines(width, ow, kind)
        points = float(most_y * most_x)
        if level + 1 < len(sizes):
            area = level_assign.first_threshold(how.k_min + level, how.canonical_size, how.canonical_level)
            area *= 1.01 * how.spatial_scales[level] ** 2
            # A side of s pixels has at most s + 3 + 2 * bins lines: the most points have the boxes that are
            # as high or as wide as the map.
            high, wide = max(most_y - 3 - 2 * oh, 1), max(most_x - 3 - 2 * ow, 1)
            points = min(
                points,
                max(
                    most_y * (max(area / high, 1) + 3 + 2 * ow),
                    most_x * (max(area / wide, 1) + 3 + 2 * oh),
                ),
            )
        most = max(most, math.ceil(points))
    return most


def _most_lines(size: int, bins: int, kind: str) -> int:
    """Most points along an axis in all bins: windows overlap; samples are at least (n - 1) / n apart."""
    if kind == "pool":
        return size + 2 * bins
    lines = [bins, *(min(bins * n, (size + 1) * n // (n - 1) + 8) for n in range(2, size + 16))]
    return max(lines)
