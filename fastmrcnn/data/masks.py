"""Segmentations as COCO writes them, checked and turned into bitmaps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.data.values import all_finite

Window = tuple[int, int, int, int]

FARTHEST = 1_000_000  # pixels; pycocotools walks along each edge, wherever it leads


def segmentation_problem(segmentation: Any, height: int, width: int) -> str | None:
    """What is wrong with a segmentation, or None. Nothing is rasterised.

    Args:
        segmentation: a list of polygons [x1, y1, x2, y2, ...], or an RLE with "size" and "counts".
    """
    if isinstance(segmentation, dict):
        return _rle_problem(segmentation, height, width)
    if not isinstance(segmentation, list):
        return "segmentation is neither a list of polygons nor an RLE"
    if segmentation and not isinstance(segmentation[0], list):
        return "segmentation must be a list of polygons, [[x1, y1, x2, y2, ...]]"
    for polygon in segmentation:
        if not isinstance(polygon, list) or not all_finite(polygon):
            return "polygon has coordinates that are not finite numbers"
        if len(polygon) % 2:
            return f"polygon has {len(polygon)} coordinates, an odd number"
        if len(polygon) < 6:
            return f"polygon has {len(polygon) // 2} points, fewer than 3"
        if max(polygon) > FARTHEST or min(polygon) < -FARTHEST:
            return f"polygon has a coordinate of more than {FARTHEST:,} pixels"
    return None


def pack_polygons(segmentation: Any) -> Any:
    """The segmentation, its polygons as arrays: a quarter of the memory, and nothing in them that
    loader processes would have to copy because a reference count in it changed."""
    if not isinstance(segmentation, list):
        return segmentation
    return [np.asarray(polygon, np.float64) for polygon in segmentation]


def rasterise(segmentation: Any, height: int, width: int) -> dict[str, Any]:
    """Compressed RLE of the union of polygons, or of an RLE; pixels outside the image are cut off."""
    if isinstance(segmentation, list):
        return coco_mask.merge(coco_mask.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return coco_mask.frPyObjects(segmentation, height, width)
    return segmentation


def bitmap(segmentation: Any, height: int, width: int) -> tuple[NDArray[np.uint8], Window]:
    """Bitmap of a segmentation, cropped to its extent.

    Returns:
        (h, w) uint8 of 0 and 1, and the crop's (x, y, w, h) in the image; both are empty for a
        segmentation that covers no pixel.
    """
    if not segmentation:
        return np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
    rle = rasterise(segmentation, height, width)
    x, y, w, h = (int(side) for side in coco_mask.toBbox(rle))
    if w == 0 or h == 0:
        return np.zeros((0, 0), np.uint8), (0, 0, 0, 0)
    whole = coco_mask.decode(rle)
    return np.ascontiguousarray(whole[y : y + h, x : x + w]), (x, y, w, h)


def whole_bitmaps(segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.bool_]:
    """Bitmaps of segmentations in the whole image, (n, height, width)."""
    masks = np.zeros((len(segmentations), height, width), dtype=bool)
    for mask, segmentation in zip(masks, segmentations, strict=True):
        crop, (x, y, w, h) = bitmap(segmentation, height, width)
        mask[y : y + h, x : x + w] = crop
    return masks


def mask_area(segmentation: Any, height: int, width: int) -> int:
    """Pixels covered."""
    return int(coco_mask.area(rasterise(segmentation, height, width))) if segmentation else 0


def _rle_problem(rle: dict[str, Any], height: int, width: int) -> str | None:
    size, counts = rle.get("size"), rle.get("counts")
    if size != [height, width] or not all(type(side) is int for side in size):
        return f"RLE has size {size}, its image [height, width] = [{height}, {width}]"
    if isinstance(counts, list):
        if not all(isinstance(run, int) and run >= 0 for run in counts):
            return "RLE has counts that are not whole numbers from 0"
        total = sum(counts)
    elif isinstance(counts, str):
        found = _compressed_total(counts)
        if found is None:
            return "RLE has counts that are not a COCO string"
        total = found
    else:
        return "RLE has neither a list nor a string of counts"
    if total != height * width:
        return f"RLE counts add up to {total} pixels, not {height} x {width}"
    return None


def _compressed_total(counts: str) -> int | None:
    """Pixels that a compressed RLE speaks of; None for one that cannot be read.

    pycocotools does not check this itself: it returns uninitialised memory past a short RLE. Each
    number is coded in characters from chr(48) that carry 5 bits each, lowest first, with 0x20 for
    "more follows" and 0x10 of the last one for the sign; from the fourth number on, the number is
    the difference to the run before the previous one.
    """
    if not counts.isascii():
        return None
    code = np.frombuffer(counts.encode(), np.uint8).astype(np.int64) - 48
    if code.size == 0 or code.min() < 0 or code.max() > 63 or code[-1] & 0x20:
        return None
    last = (code & 0x20) == 0
    start = np.flatnonzero(np.concatenate(([True], last[:-1])))
    digits = np.diff(np.append(start, code.size))
    if digits.max() > 7:  # more than 35 bits: no image is so large
        return None
    place = np.arange(code.size) - np.repeat(start, digits)
    values = np.add.reduceat((code & 0x1F) << (5 * place), start)
    values -= np.where(code[last] & 0x10, np.int64(1) << (5 * digits), 0)
    # runs[i] = values[i] + runs[i - 2] from i = 3 on, so each chain of every other run is a running sum
    values[1::2] = np.cumsum(values[1::2])
    values[2::2] = np.cumsum(values[2::2])
    return None if values.min() < 0 else int(values.sum())
