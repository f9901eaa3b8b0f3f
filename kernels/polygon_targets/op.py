"""Mask targets from polygons: the public function and its registration."""

from __future__ import annotations

import torch
from torch import Tensor

from .._library import NAMESPACE, chosen, may_look, require_all, runs_triton, switchable
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
        to_input: (N, 2, 3) float64, affine map from annotation pixels (x, y, 1) to input pixels.
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
    _check(boxes, image, matched, vertices, part_start, first_part, parts, to_input, step, resolution)
    rasterise = chosen("polygon_mask_targets", _polygon_mask_targets, cpu.polygon_mask_targets)
    return rasterise(
        boxes.detach().float(),
        image,
        matched,
        vertices.detach(),
        part_start,
        first_part,
        parts,
        to_input.detach(),
        step,
        resolution,
    )


def _check(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,
    resolution: int,
) -> None:
    if boxes.ndim != 2 or boxes.shape[1] != 4 or not boxes.is_floating_point():
        raise ValueError(f"boxes must be floating point (T, 4), got {boxes.dtype} {tuple(boxes.shape)}")
    if first_part.ndim != 2:
        raise ValueError(f"first_part must be (N, G), got {tuple(first_part.shape)}")
    images, slots = first_part.shape
    indices = (torch.int64, torch.int32)
    expected = {
        "image": (image, (len(boxes),), indices),
        "matched": (matched, (len(boxes),), indices),
        "vertices": (vertices, (None, 2), (torch.float64,)),
        "part_start": (part_start, (None,), (torch.int32,)),
        "first_part": (first_part, (images, slots), (torch.int32,)),
        "parts": (parts, (images, slots), (torch.int32,)),
        "to_input": (to_input, (images, 2, 3), (torch.float64,)),
        "step": (step, (None,), indices),
    }
    for name, (tensor, shape, dtypes) in expected.items():
        fits = tensor.ndim == len(shape) and all(
            want is None or size == want for size, want in zip(tensor.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("*" if want is None else str(want) for want in shape)
            raise ValueError(f"{name} must be ({wanted}), got {tuple(tensor.shape)}")
        if tensor.dtype not in dtypes:
            wanted = " or ".join(str(dtype) for dtype in dtypes)
            raise ValueError(f"{name} must be {wanted}, got {tensor.dtype}")
        if tensor.device != boxes.device:
            raise ValueError(f"{name} must be on {boxes.device} as boxes are, got {tensor.device}")
    if vertices.shape[0] < 1 or part_start.shape[0] < 2:
        raise ValueError(
            f"vertices must be (V, 2) and part_start (P + 1,) with V and P at least 1, "
            f"got {tuple(vertices.shape)} and {tuple(part_start.shape)}"
        )
    if 0 in first_part.shape and len(boxes):
        raise ValueError(f"first_part must have slots for {len(boxes)} boxes, got {(images, slots)}")
    if resolution < 1:
        raise ValueError(f"resolution must be positive, got {resolution}")
    if may_look(boxes):
        known = cpu.in_range(image, matched, first_part)
        ranges = f"0..{images - 1} and 0..{slots - 1}"
        require_all(
            known,
            lambda: (
                f"image and matched must be in {ranges}, got "
                f"{list(zip(image[~known][:5].tolist(), matched[~known][:5].tolist(), strict=True))}"
            ),
        )


@torch.library.custom_op(f"{NAMESPACE}::polygon_mask_targets", mutates_args=())
def _polygon_mask_targets(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,
    resolution: int,
) -> Tensor:
    arguments = (boxes, image, matched, vertices, part_start, first_part, parts, to_input)
    if runs_triton(boxes):
        from . import kernel

        return kernel.polygon_mask_targets(*arguments, resolution)
    return cpu.polygon_mask_targets(*arguments, step, resolution)


@_polygon_mask_targets.register_fake
def _(
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    vertices: Tensor,
    part_start: Tensor,
    first_part: Tensor,
    parts: Tensor,
    to_input: Tensor,
    step: Tensor,
    resolution: int,
) -> Tensor:
    return boxes.new_empty((boxes.shape[0], resolution, resolution), dtype=torch.bool)
