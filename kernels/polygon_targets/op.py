"""Mask targets from polygons: the public function and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..common.bitmaps import slot_of
from ..common.checks import check_range, require, require_at_least
from ..common.library import chosen, register, switchable
from . import cpu


@switchable
def polygon_mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,
    *,
    resolution: int,
) -> Tensor:
    """The matched object's polygons, rasterised on an M x M grid over each box.

    The result is, bit for bit, that of detectron2's PolygonMasks.crop_and_resize: vertices in float64,
    sides of a box of at least 0.1, then pycocotools' rule (`naive.py`). Boxes may reach over the image,
    polygons over the box. A polygon that crosses itself is filled by the even-odd rule; an object is the
    union of its parts.

    Args:
        boxes: (T, 4) floating point, xyxy in input pixels, taken as float32. Boxes that are not finite
            give zeros.
        image: (T,) integer in 0..N-1.
        matched: (T,) integer in 0..G-1, slot of the object in the tables below.
        vertices: (V, 2) float64 x, y in annotation pixels, finite; polygons end to end.
        part_start: (P + 1,) int32, never falling: part p is vertices[part_start[p] : part_start[p + 1]].
        first_part: (N, G) int32, first part of each object; its parts follow each other.
        parts: (N, G) int32, how many it has. An object without parts gives zeros.
        to_input: (N, 2, 3) float64, affine map from annotation pixels (x, y, 1) to input pixels;
            (N, G, 2, 3) where objects of an input have each a map of its own.
        step: (E,) integer 0, 1, ... E-1, where no object has more than E vertices: a bound that can be
            read from a shape. What an object has beyond it is undefined.
        resolution: M, side of the masks.
    Returns:
        (T, M, M) bool, rows first.
    Raises:
        ValueError: a shape, dtype or device is not as above, or resolution is not positive; in eager mode
            on the CPU also if image or matched is out of range. On CUDA and when compiled such a box
            gives zeros.
    """
    require("boxes", boxes, ("T", 4), "floating point")
    total, like = boxes.shape[0], ("boxes", boxes)
    require("image", image, (total,), "integer", like)
    require("matched", matched, (total,), "integer", like)
    require("vertices", vertices, ("V", 2), torch.float64, like)
    require("part_start", part_start, ("P + 1",), torch.int32, like)
    require_at_least("P in part_start", part_start.shape[0] - 1, 1)
    require("first_part", first_part, ("N", "G"), torch.int32, like)
    require("parts", parts, tuple(first_part.shape), torch.int32, ("first_part", first_part))
    images, slots = first_part.shape
    maps = (images,) if to_input.dim() != 4 else (images, slots)
    require("to_input", to_input, (*maps, 2, 3), torch.float64, ("first_part", first_part))
    require("step", step, ("E",), "integer", like)
    if total and not images * slots:
        raise ValueError(f"first_part must have slots for {total} boxes, got {(images, slots)}")
    require_at_least("resolution", resolution, 1)
    check_range("image", image, images)
    check_range("matched", matched, slots)
    if to_input.dim() == 4:  # as N * G images with one object each
        image = slot_of(image, matched, images, slots)
        matched = torch.zeros_like(image)
        first_part, parts, to_input = (
            first_part.reshape(-1, 1),
            parts.reshape(-1, 1),
            to_input.reshape(-1, 2, 3),
        )
    rasterise = chosen("polygon_mask_targets", _polygon_mask_targets, cpu.polygon_mask_targets)
    tables = (vertices.detach(), part_start, first_part, parts, to_input.detach(), step)
    return rasterise(boxes.detach().float(), image, matched, *tables, resolution)


_polygon_mask_targets = register(cpu.polygon_mask_targets)


@_polygon_mask_targets.register_fake
def _(boxes: Tensor, *rest: Any) -> Tensor:
    return boxes.new_empty((boxes.shape[0], rest[-1], rest[-1]), dtype=torch.bool)
