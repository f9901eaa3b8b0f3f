"""Mask targets: public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import NAMESPACE, check_range, chosen, in_full_precision, runs_triton, switchable
from . import cpu
from .cpu import Bitmaps, Sampling


@switchable
def mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    *,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    resolution: int,
    sampling_ratio: int = 2,
    aligned: bool = True,
    bitmap: bool = False,
    valid: Tensor | None = None,
) -> Tensor:
    """RoIAlign average of the matched object's bitmap within each box (Mask R-CNN, arXiv 1703.06870).

    Args:
        boxes: (F, 4) floating point xyxy in input pixels, within the image. Positions are computed in
            float32, for float64 boxes in float64. Boxes that are not finite give zeros.
        image: (F,) integer in 0..N-1.
        matched: (F,) integer in 0..G-1, slot of the object in the tables below.
        buffer: (B,) uint8, the objects' bitmaps (0 or 1), each cropped to its window, end to end.
        offset: (N, G) integer, first byte of each crop.
        window: (N, G, 4) integer x, y, width, height of each crop in annotation pixels.
        to_annotation: (N, 2, 3) affine map from input pixels to annotation pixels.
        size: (N, 2) height and width of the annotated image.
        image_sizes: (N, 2) height and width of the image within the padded input.
        image_shape: (H, W) of the padded input.
        resolution: M, side of the masks.
        sampling_ratio: samples per mask pixel and axis, each read bilinearly in the annotation's own
            resolution. 0 or less: adaptive, ceil(side / M) samples, read in the input's resolution;
            for an input that is not resized, the numbers of torchvision and detectron2.
        aligned: half-pixel correct sampling (detectron2); false: torchvision.
        bitmap: ask whether the average is at least a half.
        valid: (F,) bool; slots that are not valid give zeros and take no time. None: all are.

    Returns:
        (F, M, M) in 0..1, float32 (float64 for float64 boxes); bool for `bitmap`. An object without a
        window gives zeros. There is no gradient.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; in eager mode on the CPU also if an
            image or an object of a valid slot is out of range, which elsewhere gives zeros.
    """
    bitmaps = Bitmaps(buffer, offset, window, to_annotation, size, image_sizes)
    check(boxes, image, matched, valid, bitmaps)
    if resolution < 1:
        raise ValueError(f"resolution must be at least 1, got {resolution}")
    how = Sampling(shape_of(image_shape), int(resolution), max(int(sampling_ratio), 0), aligned, bitmap)
    cut = chosen("mask_targets", _mask_targets, _plain)
    return cut(boxes.detach(), image, matched, valid, *bitmaps, *how)


def shape_of(image_shape: Sequence[int]) -> tuple[int, int]:
    if len(image_shape) != 2 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be a height and a width, got {tuple(image_shape)}")
    return int(image_shape[0]), int(image_shape[1])


def check(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps) -> None:
    """Raise ValueError for what `mask_targets` says it raises for."""
    if boxes.ndim != 2 or boxes.shape[1] != 4:
        raise ValueError(f"boxes must be (F, 4), got {tuple(boxes.shape)}")
    if bitmaps.offset.ndim != 2:
        raise ValueError(f"offset must be (N, G), got {tuple(bitmaps.offset.shape)}")
    slots = boxes.shape[0]
    images, objects = bitmaps.offset.shape
    expected = {
        "image": (image, (slots,)),
        "matched": (matched, (slots,)),
        "buffer": (bitmaps.buffer, (bitmaps.buffer.numel(),)),
        "offset": (bitmaps.offset, (images, objects)),
        "window": (bitmaps.window, (images, objects, 4)),
        "to_annotation": (bitmaps.to_annotation, (images, 2, 3)),
        "size": (bitmaps.size, (images, 2)),
        "image_sizes": (bitmaps.image_sizes, (images, 2)),
    }
    if valid is not None:
        expected["valid"] = (valid, (slots,))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
        if tensor.device != boxes.device:
            raise ValueError(f"{name} must be on {boxes.device} as boxes are, got {tensor.device}")
    for name in ("image", "matched", "offset", "window"):
        dtype = expected[name][0].dtype
        if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
            raise ValueError(f"{name} must be of an integer dtype, got {dtype}")
    if not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating point, got {boxes.dtype}")
    if bitmaps.buffer.dtype != torch.uint8:
        raise ValueError(f"buffer must be uint8, got {bitmaps.buffer.dtype}")
    check_range("image of valid slots", image, images, valid)
    check_range("matched of valid slots", matched, objects, valid)


def _plain(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, *arguments: Any) -> Tensor:
    bitmaps, how = Bitmaps(*arguments[:6]), Sampling(*arguments[6:])
    return cpu.mask_targets(boxes, image, matched, valid, bitmaps, how)


@torch.library.custom_op(f"{NAMESPACE}::mask_targets", mutates_args=())
def _mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    valid: Tensor | None,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    image_sizes: Tensor,
    image_shape: Sequence[int],
    resolution: int,
    sampling_ratio: int,
    aligned: bool,
    bitmap: bool,
) -> Tensor:
    bitmaps = Bitmaps(buffer, offset, window, to_annotation, size, image_sizes)
    how = Sampling(shape_of(image_shape), resolution, sampling_ratio, aligned, bitmap)
    if runs_triton(boxes):
        from . import kernel

        return kernel.mask_targets(boxes, image, matched, valid, bitmaps, how)
    return in_full_precision(cpu.mask_targets, boxes, image, matched, valid, bitmaps, how)


@_mask_targets.register_fake
def _(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    valid: Tensor | None,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    image_sizes: Tensor,
    image_shape: Sequence[int],
    resolution: int,
    sampling_ratio: int,
    aligned: bool,
    bitmap: bool,
) -> Tensor:
    dtype = torch.bool if bitmap else cpu.position_dtype(boxes)
    return boxes.new_empty((boxes.shape[0], resolution, resolution), dtype=dtype)
