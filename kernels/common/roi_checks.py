"""What the pooling of RoIs is asked, checked before any launch and brought into one form."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_range, require
from .pooling import Pooling


def pair(size: int | Sequence[int]) -> tuple[int, int]:
    pair = (size, size) if isinstance(size, int) else tuple(size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"output_size must be a positive integer or two of them, got {size}")
    return pair[0], pair[1]


def pooling(
    output_size: int | Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    k_min: int | None,
) -> Pooling:
    """`k_min` None: that of the first map's scale."""
    scales = [float(scale) for scale in spatial_scales]
    if not all(scale > 0 and math.isfinite(scale) for scale in scales):
        raise ValueError(f"spatial scales must be positive, got {spatial_scales}")
    if not canonical_size > 0:
        raise ValueError(f"canonical_size must be positive, got {canonical_size}")
    if k_min is None:
        k_min = round(-math.log2(scales[0]))
    return Pooling(
        pair(output_size),
        scales,
        max(int(sampling_ratio), 0),
        bool(aligned),
        float(canonical_size),
        int(canonical_level),
        int(k_min),
    )


class Inputs(NamedTuple):
    """Maps and boxes in one form, checked. Boxes and their images get no gradient."""

    features: list[Tensor]  # of each level, (N, C, Hl, Wl)
    boxes: Tensor  # (R, 4)
    batch_index: Tensor | None  # (R,); None: each image has R / N boxes in turn
    valid: Tensor | None  # (R,) bool


def check_single(input: Tensor, boxes: Tensor | Sequence[Tensor]) -> Inputs:
    """Boxes of one map in the two forms of torchvision's operators: (R, 5), or a (Ri, 4) per image."""
    check_features([input], "input")
    if isinstance(boxes, Tensor):
        if boxes.ndim != 2 or boxes.shape[1] != 5:
            raise ValueError(f"boxes must be (R, 5) or a list of (Ri, 4), got {tuple(boxes.shape)}")
        batch_index, xyxy = boxes[:, 0], boxes[:, 1:]
    else:
        xyxy, batch_index = pack(boxes, input.shape[0])
    require("boxes", xyxy, ("R", 4), "floating point", ("input", input))
    check_range("image indices of boxes", batch_index, input.shape[0])
    return Inputs([input], xyxy.detach(), batch_index.detach(), None)


def check_pyramid(
    features: Sequence[Tensor],
    boxes: Tensor,
    spatial_scales: Sequence[float],
    valid: Tensor | None,
    batch_index: Tensor | None,
) -> Inputs:
    """Boxes of a pyramid: (N, S, 4), or (R, 4) with `batch_index`."""
    features = list(features)
    check_features(features, "features")
    if len(spatial_scales) != len(features):
        raise ValueError(
            f"spatial_scales must have one number per level, got {len(spatial_scales)} for {len(features)}"
        )
    num_images = features[0].shape[0]
    like = ("features", features[0])
    if batch_index is None:
        require("boxes", boxes, (num_images, "S", 4), "floating point", like)
    else:
        require("boxes with batch_index", boxes, ("R", 4), "floating point", like)
    slots, like = tuple(boxes.shape[:-1]), ("boxes", boxes)
    require("valid", valid, slots, torch.bool, like)
    require("batch_index", batch_index, slots, like=like)
    if valid is not None:
        valid = valid.reshape(-1)
    if batch_index is not None:
        batch_index = batch_index.detach()
        check_range("image indices of boxes", batch_index, num_images, valid)
    return Inputs(features, boxes.detach().reshape(-1, 4), batch_index, valid)


def by_image(pooled: Tensor, boxes: Tensor, batch_index: Tensor | None) -> Tensor:
    """(R, ...) as the boxes of `check_pyramid` came: (N, S, ...), or as it is with `batch_index`."""
    return pooled.unflatten(0, boxes.shape[:-1]) if batch_index is None else pooled


def pack(boxes: Sequence[Tensor], num_images: int) -> tuple[Tensor, Tensor]:
    """Boxes by image -> ((R, 4), (R,) image of each)."""
    if len(boxes) != num_images or num_images == 0:
        raise ValueError(f"boxes must be a list of one (Ri, 4) per image, got {len(boxes)} of {num_images}")
    for part in boxes:
        if part.ndim != 2 or part.shape[1] != 4:
            raise ValueError(f"boxes must be (R, 5) or a list of (Ri, 4), got {tuple(part.shape)} in it")
    index = [part.new_full(part.shape[:1], i, dtype=torch.int32) for i, part in enumerate(boxes)]
    return torch.cat(list(boxes)), torch.cat(index)


def check_features(features: Sequence[Tensor], name: str) -> None:
    if not features:
        raise ValueError(f"{name} must not be empty")
    first = features[0]
    for feature in features:
        if feature.ndim != 4 or feature.shape[:2] != first.shape[:2]:
            raise ValueError(f"{name} must be (N, C, H, W), got {[tuple(f.shape) for f in features]}")
        if feature.shape[2] == 0 or feature.shape[3] == 0:
            raise ValueError(f"{name} must have pixels, got {tuple(feature.shape)}")
        if feature.dtype != first.dtype or feature.device != first.device:
            kinds = [f"{f.dtype} on {f.device}" for f in features]
            raise ValueError(f"{name} must be of one dtype and device, got {', '.join(kinds)}")
    if first.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"{name} must be float64, float32, float16 or bfloat16, got {first.dtype}")
