"""RoIPool, RoIWarp and max-mode RoIAlign, bin by bin: the definitions, in float64.

Arguments are those of the functions of the same name in `op`, but for `output_size`, which is a pair here.
Autograd gives the gradient of the features; that of the largest value goes to the first of equal ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..roi_align.naive import bilinear, mean_sample, pool_bins, sample_lines


def roi_pool(
    input: Tensor, boxes: Tensor, output_size: tuple[int, int], spatial_scale: float = 1.0
) -> Tensor:
    """(R, C, oh, ow) of one map (N, C, H, W) and boxes (R, 5): as of a pyramid of one level."""
    where = {"spatial_scales": [spatial_scale], "batch_index": boxes[:, 0]}
    return multilevel_roi_pool([input], boxes[:, 1:], output_size, **where)


def multilevel_roi_pool(
    features: Sequence[Tensor], boxes: Tensor, output_size: tuple[int, int], **levels: Any
) -> Tensor:
    """The largest pixel of a bin (Fast R-CNN, arXiv 1504.08083, section 2.1), rounded as by torchvision."""
    return pool_bins(pixel_lines, largest_pixel, features, boxes, output_size, **levels)


def multilevel_roi_align_max(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: tuple[int, int],
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
    **levels: Any,
) -> Tensor:
    """RoIAlign with the largest sample of a bin in place of the mean (arXiv 1703.06870, Table 2c)."""
    lines = partial(sample_lines, sampling_ratio=sampling_ratio, aligned=aligned)
    return pool_bins(lines, largest_sample, features, boxes, output_size, **levels)


def multilevel_roi_warp(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: tuple[int, int],
    *,
    mode: str = "avg",
    sampling_ratio: int = -1,
    **levels: Any,
) -> Tensor:
    """Aligned RoIAlign of the whole pixels that RoIPool rounds the box to, by mean or by largest sample."""

    def lines(low: float, high: float, bins: int) -> list[Tensor]:
        return sample_lines(*whole_pixels(low, high), bins, sampling_ratio, aligned=True)

    reduce = {"avg": mean_sample, "max": largest_sample}[mode]
    return pool_bins(lines, reduce, features, boxes, output_size, **levels)


def whole_pixels(low: float, high: float) -> tuple[int, int]:
    """A box's first pixel along an axis, and the one behind its last; it has at least one.

    Sides are rounded to pixels, halves away from zero, and the last pixel belongs to the box.
    """
    first, last = (int(math.copysign(math.floor(abs(side) + 0.5), side)) for side in (low, high))
    return first, max(last, first) + 1


def pixel_lines(low: float, high: float, bins: int) -> list[Tensor]:
    """The pixels of each bin along an axis: its ends are rounded outwards, so that bins share pixels."""
    first, end = whole_pixels(low, high)
    side = end - first
    return [torch.arange(i * side // bins, -(-(i + 1) * side // bins)) + first for i in range(bins)]


def largest_pixel(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C,): the largest pixel of those rows (h, 1) and columns (w,) that are on the map."""
    height, width = feature.shape[1:]
    return _largest(feature[:, y[(y >= 0) & (y < height)][:, None], x[(x >= 0) & (x < width)]])


def largest_sample(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C,): the largest bilinear sample of the grid of lines y (h, 1) and x (w,)."""
    return _largest(bilinear(feature, y, x))


def _largest(values: Tensor) -> Tensor:
    """(C,) of (C, h, w): NaN if there is one, 0 of nothing."""
    flat = values.flatten(1)
    return flat.max(1).values if flat.shape[1] else flat.sum(1)
