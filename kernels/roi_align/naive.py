"""RoIAlign sample by sample (Mask R-CNN, arXiv 1703.06870, section 3): the definition, in float64.

Arguments are those of the functions of the same name in `op`, but for `output_size`, which is a pair here.
Autograd gives the gradient of the features.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..level_assign.reference import assign_levels

Lines = Callable[[float, float, int], list[Tensor]]
"""Of a box along an axis, low and high in pixels of the map, and a number of bins: the positions in each."""


def roi_align(
    input: Tensor, boxes: Tensor, output_size: tuple[int, int], spatial_scale: float = 1.0, **how: Any
) -> Tensor:
    """(R, C, oh, ow) of one map (N, C, H, W) and boxes (R, 5): as of a pyramid of one level."""
    how |= {"spatial_scales": [spatial_scale], "batch_index": boxes[:, 0]}
    return multilevel_roi_align([input], boxes[:, 1:], output_size, **how)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: tuple[int, int],
    *,
    sampling_ratio: int = -1,
    aligned: bool = False,
    **levels: Any,
) -> Tensor:
    """A bin is the mean of a grid of bilinear samples; zero if it has none, as in a box without area."""
    lines = partial(sample_lines, sampling_ratio=sampling_ratio, aligned=aligned)
    return pool_bins(lines, mean_sample, features, boxes, output_size, **levels)


def multilevel_roi_align_sets(
    features: Sequence[Tensor], sets: Sequence[Any], *, aligned: bool = False, **levels: Any
) -> list[Tensor]:
    """One after the other; the gradient of a map is the sum of theirs."""
    return [
        multilevel_roi_align(
            features,
            one.boxes,
            one.output_size,
            valid=one.valid,
            batch_index=one.batch_index,
            sampling_ratio=one.sampling_ratio,
            aligned=aligned,
            **levels,
        )
        for one in sets
    ]


def sample_lines(
    low: float, high: float, bins: int, sampling_ratio: int, aligned: bool, least: int = 0
) -> list[Tensor]:
    """Where the samples of each bin lie along an axis, in pixels of the map, the first of which is at 0.

    There are `sampling_ratio` in a bin, in the middles of equal parts; if that is 0 or less, as many as the
    bin's side rounded up, and no fewer than `least`.
    """
    if aligned:  # pixel 0 of the image reaches from 0 to 1, and so does that of the map
        low, high = low - 0.5, high - 0.5
    side = high - low if aligned else max(high - low, 1.0)
    count = sampling_ratio if sampling_ratio > 0 else max(math.ceil(side / bins), least)
    middles = [(s + 0.5) / count for s in range(count)]
    lines = [[low + side / bins * (i + middle) for middle in middles] for i in range(bins)]
    return [torch.tensor(line, dtype=torch.float64) for line in lines]


def mean_sample(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C,): the mean over the grid of lines y (h, 1) and x (w,); 0 of nothing."""
    return bilinear(feature, y, x).sum((1, 2)) / max(len(y) * len(x), 1)


def bilinear(feature: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """(C, ...) values of a map (C, H, W) at positions y and x, which broadcast, in pixels of the map.

    Up to a pixel off the map the value is that on its border; beyond, it is zero.
    """
    height, width = feature.shape[1:]
    on_map = (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    top, left = y.floor().long(), x.floor().long()
    bottom, right = (top + 1).clamp(max=height - 1), (left + 1).clamp(max=width - 1)
    upper = _between(feature[:, top, left], feature[:, top, right], x - left)
    lower = _between(feature[:, bottom, left], feature[:, bottom, right], x - left)
    return _between(upper, lower, y - top).where(on_map, 0)


def _between(one: Tensor, other: Tensor, share: Tensor) -> Tensor:
    """Of equal values exactly that value, so that what ties in the map ties between its pixels."""
    return one + (other - one) * share


def pool_bins(
    lines: Lines,
    reduce: Callable[[Tensor, Tensor, Tensor], Tensor],
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: tuple[int, int],
    *,
    spatial_scales: Sequence[float],
    valid: Tensor | None = None,
    batch_index: Tensor | None = None,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> Tensor:
    """Every bin of every box, from the level that FPN's rule gives the box.

    `reduce` makes (C,) of a map (C, H, W) and of the bin's positions y (h, 1) and x (w,). Boxes that are not
    valid, not finite, or of an image that is not there give zeros, whatever the maps hold.
    """
    if batch_index is None:  # boxes are (N, S, 4)
        batch_index = torch.arange(len(boxes)).repeat_interleave(boxes.shape[1])
    k_min = round(-math.log2(spatial_scales[0])) if k_min is None else k_min
    levels = assign_levels(boxes, k_min, k_min + len(features) - 1, canonical_size, canonical_level)
    counts = torch.ones_like(levels) if valid is None else valid
    shape = (levels.numel(), features[0].shape[1], *output_size)
    pooled = features[0].new_zeros(shape, dtype=torch.float64)
    slots = (boxes.double().reshape(-1, 4), batch_index, levels.flatten(), counts.flatten())
    for r, (box, image, level, real) in enumerate(zip(*(t.tolist() for t in slots), strict=True)):
        if real and all(map(math.isfinite, box)) and image in range(len(features[level])):
            feature = features[level][int(image)].double()
            x1, y1, x2, y2 = (side * spatial_scales[level] for side in box)
            for i, y in enumerate(lines(y1, y2, output_size[0])):
                for j, x in enumerate(lines(x1, x2, output_size[1])):
                    pooled[r, :, i, j] = reduce(feature, y[:, None], x)
    return pooled.view(*boxes.shape[:-1], *shape[1:])
