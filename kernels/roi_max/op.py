"""RoIPool, RoIWarp and max-mode RoIAlign: public functions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..common.roi_checks import by_image, check_pyramid, check_single, pooling
from ..level_assign.op import assign_levels
from ..roi_align.op import multilevel_roi_align
from .points import quantise
from .registration import largest


def roi_pool(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
) -> Tensor:
    """RoIPool of one feature map (Fast R-CNN, arXiv 1504.08083), as torchvision.ops.roi_pool computes it.

    The box is rounded to whole pixels of the map and its last pixel belongs to it; bins are rounded outwards
    to whole pixels, and take their largest value. Backward is deterministic. Unlike torchvision's, a pixel
    that is NaN is the largest, as in torch.nn.functional.max_pool2d.

    Args:
        input: (N, C, H, W) fp64, fp32, fp16 or bf16, in any memory format.
        boxes: (R, 5) as (image, x1, y1, x2, y2), or of each image a (Ri, 4) of xyxy; in pixels of the
            input image, floating point. Boxes that are not finite give zeros and no gradient.
        output_size: height and width of the output, or one number for both.
        spatial_scale: pixels of the map per pixel of the image.

    Returns:
        (R, C, oh, ow) in the dtype of the input; channels_last if the input is. Bins off the map are zero.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; for CPU tensors outside of
            torch.compile, also an image index out of range, which elsewhere gives zeros.
    """
    inputs = check_single(input, boxes)
    how = pooling(output_size, [spatial_scale], 0, False, 224.0, 4, 0)
    return largest(inputs, "pool", how)


def multilevel_roi_pool(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[float],
    valid: Tensor | None = None,
    batch_index: Tensor | None = None,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> Tensor:
    """RoIPool over a feature pyramid, each box from the level that `assign_levels` gives it.

    Backward is deterministic. Under autocast the features keep their dtype.

    Args:
        features: of each level, finest first, (N, C, Hl, Wl); one dtype, fp64, fp32, fp16 or bf16.
        boxes: (N, S, 4) floating point xyxy in input pixels, or (R, 4) with `batch_index`. Boxes that
            are not finite give zeros and no gradient.
        output_size: height and width of the output, or one number for both.
        spatial_scales: of each level, its pixels per input pixel.
        valid: (N, S) or (R,) bool; slots that are not valid give zeros and no gradient, and take no time.
        batch_index: (R,) image of each box, if boxes are (R, 4).
        canonical_size: side of a square box, in input pixels, that belongs to `canonical_level`.
        canonical_level: see canonical_size.
        k_min: level of the first map; None: -log2 of its scale.

    Returns:
        (N, S, C, oh, ow), or (R, C, oh, ow), in the dtype of the features; the last three axes are
        channels_last if the maps are.

    Raises:
        ValueError: as `roi_pool`.
    """
    inputs = check_pyramid(features, boxes, spatial_scales, valid, batch_index)
    how = pooling(output_size, spatial_scales, 0, False, canonical_size, canonical_level, k_min)
    return by_image(largest(inputs, "pool", how), boxes, batch_index)


def multilevel_roi_align_max(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[float],
    valid: Tensor | None = None,
    batch_index: Tensor | None = None,
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> Tensor:
    """RoIAlign that takes the largest sample of a bin in place of the average (arXiv 1703.06870, Table 2c).

    A sample off the map, by a pixel or more, is zero, as in the average. The gradient goes to the four
    pixels about the sample that won, of equal ones the first in row-major order; backward is deterministic.
    Under autocast the features keep their dtype.

    Args:
        sampling_ratio: samples per bin and axis; 0 or less: ceil(side of the bin), at most 32767.
        aligned: shift by half a pixel, so that pixel (0, 0) is sampled at its centre. Without it boxes are
            at least one pixel of the map wide.
        features, boxes, output_size, spatial_scales, valid, batch_index, canonical_size, canonical_level,
            k_min: as in `multilevel_roi_pool`.

    Returns:
        As `multilevel_roi_pool`.

    Raises:
        ValueError: as `roi_pool`.
    """
    inputs = check_pyramid(features, boxes, spatial_scales, valid, batch_index)
    how = pooling(
        output_size, spatial_scales, sampling_ratio, aligned, canonical_size, canonical_level, k_min
    )
    return by_image(largest(inputs, "align", how), boxes, batch_index)


def multilevel_roi_warp(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[float],
    valid: Tensor | None = None,
    batch_index: Tensor | None = None,
    mode: str = "avg",
    sampling_ratio: int = -1,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> Tensor:
    """RoIWarp as the paper compares with it (arXiv 1703.06870, Table 2c): RoIAlign of a quantised box.

    The box is rounded to pixels start..end of the map just as RoIPool rounds it. In continuous coordinates,
    where pixel k covers k to k + 1 and has its value at k + 0.5, it then covers start to end + 1: so both
    operators see the same pixels, and what is left of the difference between them is that these bins are
    not rounded. From here on it is aligned RoIAlign. Backward is deterministic.

    Args:
        mode: avg | max, of the samples of a bin.
        sampling_ratio: samples per bin and axis; 0 or less: ceil(side of the bin); for max at most 32767.
        features, boxes, output_size, spatial_scales, valid, batch_index, canonical_size, canonical_level,
            k_min: as in `multilevel_roi_pool`.

    Returns:
        As `multilevel_roi_pool`.

    Raises:
        ValueError: as `roi_pool`.
    """
    if mode not in ("avg", "max"):
        raise ValueError(f"mode must be 'avg' or 'max', got {mode!r}")
    inputs = check_pyramid(features, boxes, spatial_scales, valid, batch_index)
    how = pooling(output_size, spatial_scales, sampling_ratio, True, canonical_size, canonical_level, k_min)
    if mode == "max":
        return by_image(largest(inputs, "warp", how), boxes, batch_index)
    # Levels follow from boxes before they are rounded, so each level gets a call with the boxes that it has.
    boxes = boxes.detach().to(torch.promote_types(boxes.dtype, torch.float32))
    levels = assign_levels(
        boxes,
        k_min=how.k_min,
        k_max=how.k_min + len(how.spatial_scales) - 1,
        canonical_size=how.canonical_size,
        canonical_level=how.canonical_level,
    )
    pooled: list[Tensor] = []
    for level, (feature, scale) in enumerate(zip(inputs.features, how.spatial_scales, strict=True)):
        here = (levels == level) & boxes.isfinite().all(dim=-1)  # rounding would make some infinite sides 1
        first, sides = quantise(boxes * scale)
        part = multilevel_roi_align(
            [feature],
            torch.cat([first, first + sides], dim=-1),
            how.output_size,
            spatial_scales=[1.0],
            valid=here if valid is None else here & valid,
            batch_index=batch_index,
            sampling_ratio=how.sampling_ratio,
            aligned=True,
        )
        pooled = [pooled[0] + part] if pooled else [part]
    return pooled[0]
