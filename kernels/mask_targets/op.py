"""Mask targets: public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..common.bitmaps import BITMAPS_SCHEMA, Bitmaps, Sampling, from_arguments, one_object_each
from ..common.checks import check_range, require, require_at_least
from ..common.library import chosen, in_full_precision, runs_triton, sum_dtype, switchable
from . import cpu


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
        to_annotation: (N, 2, 3) affine map from input pixels to annotation pixels; (N, G, 2, 3) where
            objects of an input come from several annotated images and have each a map of its own.
        size: (N, 2) height and width of the annotated image; with such maps (N, G, 2).
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
    require_at_least("resolution", resolution, 1)
    image, matched, bitmaps = one_object_each(image, matched, bitmaps)
    how = Sampling(shape_of(image_shape), int(resolution), max(int(sampling_ratio), 0), aligned, bitmap)
    cut = chosen("mask_targets", _mask_targets, _plain)
    return cut(boxes.detach(), image, matched, valid, *bitmaps, *how)


def shape_of(image_shape: Sequence[int]) -> tuple[int, int]:
    if len(image_shape) != 2 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be a height and a width, got {tuple(image_shape)}")
    return int(image_shape[0]), int(image_shape[1])


def check(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, bitmaps: Bitmaps) -> None:
    """Raise ValueError for what `mask_targets` says it raises for."""
    require("boxes", boxes, ("F", 4), "floating point")
    slots, like = boxes.shape[0], ("boxes", boxes)
    require("image", image, (slots,), "integer", like)
    require("matched", matched, (slots,), "integer", like)
    require("valid", valid, (slots,), like=like)
    buffer, offset, window, to_annotation, size, image_sizes = bitmaps
    require("buffer", buffer, ("B",), torch.uint8, like)
    require("offset", offset, ("N", "G"), "integer", like)
    (images, objects), like = offset.shape, ("offset", offset)
    require("window", window, (images, objects, 4), "integer", like)
    maps = (images,) if to_annotation.dim() != 4 else (images, objects)
    require("to_annotation", to_annotation, (*maps, 2, 3), like=like)
    require("size", size, (*maps, 2), like=like)
    require("image_sizes", image_sizes, (images, 2), like=like)
    check_range("image of valid slots", image, images, valid)
    check_range("matched of valid slots", matched, objects, valid)


def _plain(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, *arguments: Any) -> Tensor:
    return cpu.mask_targets(boxes, image, matched, valid, *from_arguments(arguments))


@torch.library.custom_op(
    add_op_namespace_prefix("mask_targets"),
    mutates_args=(),
    schema=f"(Tensor boxes, Tensor image, Tensor matched, Tensor? valid, {BITMAPS_SCHEMA}) -> Tensor",
)
def _mask_targets(
    boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, *arguments: Any
) -> Tensor:
    if runs_triton(boxes):
        from . import kernel

        return kernel.mask_targets(boxes, image, matched, valid, *from_arguments(arguments))
    return in_full_precision(_plain, boxes, image, matched, valid, *arguments)


@_mask_targets.register_fake
def _(boxes: Tensor, image: Tensor, matched: Tensor, valid: Tensor | None, *arguments: Any) -> Tensor:
    _, how = from_arguments(arguments)
    dtype = torch.bool if how.bitmap else sum_dtype(boxes)
    return boxes.new_empty((boxes.shape[0], how.resolution, how.resolution), dtype=dtype)
