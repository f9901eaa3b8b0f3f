"""Annotations that are written as COCO's own files are: all checked at once, in a fraction of the time."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.masks import FARTHEST, segmentation_problem
from fastmrcnn.data.records import ImageRecord

CHUNK = 4096  # annotations; those beside a faulty one are looked at one by one


def pack_plain(
    entries: Sequence[Any], records: Mapping[Any, ImageRecord], index_of: Mapping[Any, int]
) -> list[Any] | None:
    """The packed segmentations of annotations that are as COCO has them: `tidy` would change nothing in them,
    and `annotation_fault` finds nothing.

    Returns:
        For each entry a list of arrays (x1, y1, x2, y2, ...), its RLE, or None. None in all: one of the
        entries may be otherwise.
    """
    if _types(entries) != {dict}:
        return None
    image_ids, crowd = _column(entries, "image_id"), [entry.get("iscrowd", 0) for entry in entries]
    for values, known in (
        (image_ids, records.keys()),
        (_column(entries, "category_id"), index_of.keys()),
        (crowd, {0, 1}),
    ):
        if _types(values) != {int} or not set(values) <= known:
            return None
    boxes, shapes = _column(entries, "bbox"), _column(entries, "segmentation")
    if any(_column(entries, "ignore")) or _types(boxes) != {list} or set(map(len, boxes)) != {4}:
        return None
    if not _types(chain.from_iterable(boxes)) <= {int, float} or _flat(boxes) is None:
        return None
    return _pack_shapes(shapes, [records[image_id] for image_id in image_ids])


def _pack_shapes(shapes: Sequence[Any], records: Sequence[ImageRecord]) -> list[Any] | None:
    if not _types(shapes) <= {list, dict, type(None)}:
        return None
    polygons = list(chain.from_iterable(shape for shape in shapes if type(shape) is list))
    if not _types(polygons) <= {list}:
        return None
    lengths = list(map(len, polygons))
    if any(length < 6 or length % 2 for length in lengths) or (flat := _flat(polygons)) is None:
        return None
    packed: list[Any] = []
    end = 0
    sides = iter(lengths)
    for shape, record in zip(shapes, records, strict=True):
        if type(shape) is list:
            parts = []
            for _ in shape:
                start, end = end, end + next(sides)
                parts.append(flat[start:end])
            packed.append(parts or None)
        else:
            if shape is not None and segmentation_problem(shape, record.height, record.width) is not None:
                return None
            packed.append(shape)
    return packed


def _column(entries: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return [entry.get(key) for entry in entries]


def _types(values: Iterable[Any]) -> set[type]:
    return set(map(type, values))


def _flat(lists: Sequence[list[Any]]) -> NDArray[np.float64] | None:
    """All numbers one behind the other; None if something is no number, or too far away."""
    joined = array("d")
    try:
        for values in lists:
            joined.fromlist(values)
    except (TypeError, OverflowError):
        return None
    flat = np.frombuffer(joined, np.float64) if joined else np.empty(0)
    return flat if np.abs(flat).max(initial=0.0) <= FARTHEST else None
