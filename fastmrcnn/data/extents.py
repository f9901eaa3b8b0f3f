"""Where masks lie, beside where their boxes say they do: for all objects of a set at once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.data.masks import rasterise

Array = NDArray[np.float64]

SLACK = 2.0  # pixels by which an edge may be off: rounding, and pixels counted from 0 or from 1
FRACTIONS = "boxes look like fractions of the image, and COCO's are in pixels"
SHARE = 0.1  # of the mask's side by which it may be off: boxes drawn by hand


def mask_extents(shapes: Sequence[Any], heights: Sequence[int], widths: Sequence[int]) -> tuple[Array, Array]:
    """The smallest box around each mask, and about how many pixels it covers. Polygons are not rasterised.

    Args:
        shapes: n of them, each a list of arrays (x1, y1, x2, y2, ...), an RLE that is valid, or None.
    Returns:
        (n, 4) xyxy in annotation pixels, not clipped; and (n,) areas. NaN where there is no mask; an RLE
        that covers no pixel has an area of 0.
    """
    extents = np.full((len(shapes), 4), np.nan)
    areas = np.full(len(shapes), np.nan)
    polygons = [index for index, shape in enumerate(shapes) if isinstance(shape, list)]
    if polygons:
        extents[polygons], areas[polygons] = _polygon_extents([shapes[index] for index in polygons])
    runs = [index for index, shape in enumerate(shapes) if isinstance(shape, dict)]
    if runs:
        rles = [rasterise(shapes[index], heights[index], widths[index]) for index in runs]
        boxes = coco_mask.toBbox(rles)
        extents[runs] = np.concatenate((boxes[:, :2], boxes[:, :2] + boxes[:, 2:]), 1)
        # pycocotools puts the length of the list that it is given into a byte.
        parts = [coco_mask.area(rles[start : start + 255]) for start in range(0, len(rles), 255)]
        areas[runs] = np.concatenate(parts)
    return extents, areas


def _polygon_extents(shapes: list[list[Array]]) -> tuple[Array, Array]:
    flat = np.concatenate([polygon for shape in shapes for polygon in shape]).reshape(-1, 2)
    lengths = np.array([len(polygon) // 2 for shape in shapes for polygon in shape])
    ends = np.cumsum(lengths)
    starts = ends - lengths
    following = np.arange(1, len(flat) + 1)
    following[ends - 1] = starts
    x, y = flat.T
    area = abs(np.add.reduceat(x * y[following] - x[following] * y, starts)) / 2
    parts = np.array([len(shape) for shape in shapes])
    first = np.cumsum(parts) - parts  # polygon of each shape
    low = np.minimum.reduceat(np.minimum.reduceat(flat, starts), first)
    high = np.maximum.reduceat(np.maximum.reduceat(flat, starts), first)
    return np.concatenate((low, high), 1), np.add.reduceat(area, first)


def clip_boxes(boxes: Array, sizes: Array) -> Array:
    """Boxes cut to their images: (n, 4) xyxy, and (n, 2) of width, height."""
    return np.minimum(np.maximum(boxes, 0), np.concatenate((sizes, sizes), 1))


def agree(boxes: Array, extents: Array) -> NDArray[np.bool_]:
    """Whether the edges of each box are those of its mask, but for what rounding and a hand do."""
    sides = extents[:, 2:] - extents[:, :2]
    allowed = np.maximum(SLACK, SHARE * np.concatenate((sides, sides), 1))
    return np.all(abs(boxes - extents) <= allowed, axis=1)


def apart(boxes: Array, extents: Array) -> NDArray[np.bool_]:
    """Whether each box and its mask share less than half of what they cover together, a pixel more or less
    at each edge set aside."""
    wide = np.array([-1.0, -1.0, 1.0, 1.0])
    one, other = boxes + wide, extents + wide
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    common = np.prod(np.maximum(high - low, 0), 1)
    both = np.prod(one[:, 2:] - one[:, :2], 1) + np.prod(other[:, 2:] - other[:, :2], 1) - common
    return 2 * common < both


def likely_reason(boxes: Array, extents: Array, sizes: Array) -> tuple[str, float]:
    """What would make boxes and masks agree, and of how many of them.

    Args:
        boxes, extents: (n, 4) xyxy as in the file, not clipped; n of 1 or more.
        sizes: (n, 2) width and height of the images.
    Returns:
        The likeliest reason, or "" if none holds for half of them; and the share that it explains.
    """
    scale = np.concatenate((sizes, sizes), 1)
    width, height = sizes.T
    x1, y1, x2, y2 = boxes.T
    w, h = x2 - x1, y2 - y1

    def box(*edges: Array) -> Array:
        return np.stack(edges, 1)

    ways = [
        ("bbox holds [x1, y1, x2, y2], and COCO's is [x, y, width, height]", box(x1, y1, w, h), extents),
        ("bbox holds the centre, and COCO's begins with the upper left corner",
         box(x1 - w / 2, y1 - h / 2, x1 + w / 2, y1 + h / 2), extents),
        ("one counts y from the bottom of the image", box(x1, height - y2, x2, height - y1), extents),
        ("one counts x from the right of the image", box(width - x2, y1, width - x1, y2), extents),
        ("one is turned by half a turn", box(width - x2, height - y2, width - x1, height - y1), extents),
        ("x and y are exchanged in one", box(y1, x1, y2, x2), extents),
        ("masks look like fractions of the image, and COCO's are in pixels", boxes, extents * scale),
        (FRACTIONS, boxes * scale, extents),
        ("masks look like percent of the image, and COCO's are in pixels", boxes, extents * scale / 100),
        ("boxes look like percent of the image, and COCO's are in pixels", boxes * scale / 100, extents),
    ]  # fmt: skip
    if len(boxes) >= 3:  # fewer are explained by any offset or scale
        offset = np.median(extents[:, :2] - boxes[:, :2], 0)
        dx, dy = offset.tolist()
        ways.append(
            (f"masks lie {dx:+.0f}, {dy:+.0f} pixels from the boxes", boxes + np.tile(offset, 2), extents)
        )
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = (extents[:, 2:] - extents[:, :2]) / (boxes[:, 2:] - boxes[:, :2])
        factor = (
            np.median(ratio[np.isfinite(ratio).all(1)], 0) if np.isfinite(ratio).all(1).any() else np.ones(2)
        )
        ways.append(("one is of another size of the image", boxes * np.tile(factor, 2), extents))
    shares = [float(agree(one, other).mean()) for _, one, other in ways]
    best = int(np.argmax(shares))
    return (ways[best][0], shares[best]) if shares[best] >= 0.5 else ("", 0.0)
