"""What is left of an image's objects where a part of it is cut off, turned away or covered.

Bitmaps are asked in the pixels of the annotation, each at its centre or by its outline; none is drawn anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.affine import is_axis_aligned, transform_boxes
from fastmrcnn.data.polygons import ImagePolygons

Area = tuple[float, float, float, float]  # xyxy in pixels of the sample

MIN_SIDE = 1.0  # of a box in pixels of the sample: smaller objects are left out, as torchvision does


class Cover(NamedTuple):
    """What lies over an image's objects."""

    boxes: NDArray[np.float32]  # (m, 4) in pixels of the sample: elsewhere nothing is covered
    hides: Callable[[NDArray[np.float64]], NDArray[np.bool_]]  # places (n, 2), x and y -> (n,)


class Seen(NamedTuple):
    keep: NDArray[np.int64]  # (m,) the objects of which something is left
    boxes: NDArray[np.float32]  # (m, 4) in pixels of the sample
    share: NDArray[np.float64]  # (m,) how much of each is left
    bitmaps: dict[int, NDArray[np.uint8]]  # by object, the crops of which a part is gone; their windows stay


def seen_objects(
    boxes: NDArray[np.float32],
    crops: Sequence[NDArray[np.uint8]],
    windows: NDArray[np.int32],
    polygons: ImagePolygons | None,
    forward: NDArray[np.float64],
    area: Area,
    *,
    cover: Cover | None = None,
    erase: bool = False,
) -> Seen:
    """Which objects of an image are left within `area`, and their boxes there.

    An object that is wholly within keeps the box that it is annotated with; under a rotation, its box is
    that of the turned outline. Where an object is cut, the cut sides are those of what is left of its
    bitmap, or of its box if it has none.

    Args:
        boxes: (n, 4) in annotation pixels.
        crops, windows: the bitmaps (h, w), empty if there is none, and (n, 4) their places.
        polygons: for exact outlines under a rotation.
        forward: (2, 3) from annotation pixels to those of the sample.
        cover: what hides objects.
        erase: whether bitmaps are erased outside of `area`, because something else is shown there. Under
            what covers them they always are.
    """
    straight = is_axis_aligned(forward)
    moved = transform_boxes(boxes, forward)
    if not straight:
        moved = _intersection(moved, _turned_boxes(boxes, crops, windows, polygons, forward))
    clipped = _clip(moved, area)
    inside = (clipped == moved).all(axis=1)
    share = np.ones(len(boxes))
    bitmaps: dict[int, NDArray[np.uint8]] = {}
    for i in np.flatnonzero((clipped[:, 2:] > clipped[:, :2]).all(axis=1)).tolist():
        above = cover if cover is not None and _overlap(clipped[i], cover.boxes) else None
        if inside[i] and above is None:
            continue
        if crops[i].size == 0:
            share[i] = _area_of(clipped[i]) / _area_of(moved[i])
        elif straight and above is None and not erase:
            clipped[i], share[i] = _cut_straight(crops[i], windows[i], moved[i], forward, area)
        else:
            clipped[i], share[i], left = _cut(crops[i], windows[i], moved[i], forward, area, above)
            if left is not None:
                bitmaps[i] = left
    keep = np.flatnonzero((clipped[:, 2:] - clipped[:, :2] >= MIN_SIDE).all(axis=1) & (share > 0))
    return Seen(keep, clipped[keep].astype(np.float32), share[keep], bitmaps)


def _cut_straight(
    crop: NDArray[np.uint8],
    window: NDArray[np.int32],
    moved: NDArray[np.float64],
    forward: NDArray[np.float64],
    area: Area,
) -> tuple[NDArray[np.float64], float]:
    """Box and share of what a straight border leaves."""
    back = np.linalg.inv(np.concatenate([forward, [[0, 0, 1]]]))[:2]
    seen = transform_boxes(np.array([area]), back)[0]
    x, y, width, height = window.tolist()
    edge = np.array([width, height])
    low = np.clip(np.floor(seen[:2] - (x, y) + 1e-6), 0, edge).astype(int)
    high = np.clip(np.ceil(seen[2:] - (x, y) - 1e-6), 0, edge).astype(int)
    part = crop[low[1] : high[1], low[0] : high[0]]
    columns, rows = np.flatnonzero(part.any(axis=0)), np.flatnonzero(part.any(axis=1))
    if not columns.size:
        return np.zeros(4), 0.0
    first = np.array([columns[0], rows[0]]) + low + (x, y)
    last = np.array([columns[-1], rows[-1]]) + low + (x + 1, y + 1)
    whole = transform_boxes(np.array([[x, y, x + width, y + height]]), forward)[0]
    left = transform_boxes(np.array([[*first, *last]]), forward)[0]
    return _clip(np.where(left == whole, moved, left)[None], area)[0], float(part.sum() / crop.sum())


def _cut(
    crop: NDArray[np.uint8],
    window: NDArray[np.int32],
    moved: NDArray[np.float64],
    forward: NDArray[np.float64],
    area: Area,
    cover: Cover | None,
) -> tuple[NDArray[np.float64], float, NDArray[np.uint8] | None]:
    """Box and share of what is left of a bitmap, pixel by pixel; and the bitmap, if something is gone."""
    rows, columns = np.nonzero(crop)
    centres = np.stack([columns + window[0] + 0.5, rows + window[1] + 0.5], axis=1) @ forward[:, :2].T
    centres += forward[:, 2]
    low, high = np.array(area[:2]), np.array(area[2:])
    half = np.abs(forward[:, :2]).sum(axis=1) / 2  # of a pixel as it lies in the sample
    within = ((centres >= low) & (centres <= high)).all(axis=1)
    if cover is not None:
        within[within] = ~cover.hides(centres[within])
    if not within.any():
        return np.zeros(4), 0.0, None
    extents = [
        np.concatenate([some.min(axis=0) - half, some.max(axis=0) + half])
        for some in (centres, centres[within])
    ]
    box = _clip(np.where(extents[0] == extents[1], moved, extents[1])[None], area)[0]
    if within.all():
        return box, 1.0, None
    left = np.zeros_like(crop)
    left[rows[within], columns[within]] = 1
    return box, float(within.mean()), left


def _turned_boxes(
    boxes: NDArray[np.float32],
    crops: Sequence[NDArray[np.uint8]],
    windows: NDArray[np.int32],
    polygons: ImagePolygons | None,
    forward: NDArray[np.float64],
) -> NDArray[np.float64]:
    """(n, 4), the boxes of outlines after an affine map: of polygons, else of bitmaps, else of boxes."""
    found = np.empty((len(boxes), 4))
    start = part = 0
    for i, box in enumerate(boxes):
        count = 0
        if polygons is not None:
            count = int(polygons.lengths[part : part + polygons.parts[i]].sum())
            part += int(polygons.parts[i])
        if polygons is not None and count:
            outline = polygons.vertices[start : start + count].clip(box[:2], box[2:])
            start += count
        elif crops[i].size:
            outline = _row_ends(crops[i], windows[i])
        else:
            outline = box[[0, 1, 2, 3, 0, 3, 2, 1]].reshape(4, 2).astype(np.float64)
        places = outline @ forward[:, :2].T + forward[:, 2]
        found[i] = np.concatenate([places.min(axis=0), places.max(axis=0)])
    return found


def _row_ends(crop: NDArray[np.uint8], window: NDArray[np.int32]) -> NDArray[np.float64]:
    """(k, 2), the corners of the first and the last pixel of each row: the convex hull has no others."""
    rows = np.flatnonzero(crop.any(axis=1))
    some = crop[rows] > 0
    first, last = some.argmax(axis=1), crop.shape[1] - some[:, ::-1].argmax(axis=1)
    x = np.concatenate([first, first, last, last]) + window[0]
    y = np.concatenate([rows, rows + 1, rows, rows + 1]) + window[1]
    return np.stack([x, y], axis=1).astype(np.float64)


def _clip(boxes: NDArray[np.float64], area: Area) -> NDArray[np.float64]:
    return boxes.clip(np.array(area[:2] * 2), np.array(area[2:] * 2))


def _overlap(box: NDArray[np.float64], boxes: NDArray[np.float32]) -> bool:
    return bool(((boxes[:, :2] < box[2:]) & (boxes[:, 2:] > box[:2])).all(axis=1).any())


def _intersection(one: NDArray[np.float64], other: NDArray[np.float64]) -> NDArray[np.float64]:
    low, high = np.maximum(one[:, :2], other[:, :2]), np.minimum(one[:, 2:], other[:, 2:])
    return np.concatenate([low, np.maximum(low, high)], axis=1)


def _area_of(box: NDArray[np.float64]) -> float:
    return float((box[2] - box[0]) * (box[3] - box[1]))
