"""Sets as they were before they became flat arrays, and data in a form that can be compared to the bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from fastmrcnn.data import contents
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat import ObjectColumns, flatten
from fastmrcnn.data.records import ImageRecord, ObjectRecord


@contextmanager
def never_flattened(folder: Path, file: Path) -> Iterator[list[ImageRecord]]:
    """Takes what a reader finds on its way into the arrays; the list is filled when the block ends."""
    calls: list[tuple[Any, ...]] = []

    def keep(*given: Any) -> Any:
        ids, sizes, names, objects = given
        names = list(names)
        calls.append((list(ids), list(sizes), names, objects))
        return flatten(ids, sizes, names, objects)

    found: list[ImageRecord] = []
    with mock.patch.object(contents, "flatten", keep):
        yield found
    for ids, sizes, names, objects in calls:
        for place, (image_id, (height, width), name) in enumerate(zip(ids, sizes, names, strict=True)):
            items = [record_of(objects, row) for row in np.flatnonzero(objects.image == place)]
            found.append(ImageRecord(image_id, folder / name, name, width, height, items, file))


def record_of(objects: ObjectColumns, row: int) -> ObjectRecord:
    return ObjectRecord(
        objects.annotation_ids[row],
        objects.classes[row],
        tuple(objects.boxes[row].tolist()),  # type: ignore[arg-type]
        objects.crowd[row],
        objects.shapes[row],
        objects.areas[row],
        objects.keypoints[row],
    )


def plain(record: ImageRecord) -> list[Any]:
    """A record without arrays, floats by their bits."""
    image = [record.image_id, record.path, record.file_name, record.width, record.height, record.annotations]
    return [*image, record.reading, [plain_object(item) for item in record.objects]]


def plain_object(item: ObjectRecord) -> list[Any]:
    shape = item.segmentation
    if isinstance(shape, dict):  # other keys say nothing of it
        shape = {"size": shape["size"], "counts": shape["counts"]}
    elif shape is not None:
        shape = [bits(polygon) for polygon in shape]
    points = None if item.keypoints is None else bits(item.keypoints)
    box = [one.hex() for one in item.box]
    types = [type(item.annotation_id), type(item.class_index), type(item.crowd), type(item.area)]
    return [item.annotation_id, item.class_index, box, item.crowd, shape, item.area.hex(), points, types]


def bits(array: np.ndarray[Any, Any]) -> tuple[Any, ...]:
    return array.dtype, array.shape, array.tobytes(), array.flags.writeable


def everything(dataset: CocoDataset) -> list[Any]:
    """All that there is of a set but its tree."""
    return [
        [plain(record) for record in dataset.records],
        dataset.class_names,
        dataset.category_ids,
        list(dataset.skipped.items()),
        dataset.clipped,
        repr(dataset.findings),
        dataset.keypoints,
        dataset.unlabelled,
        dataset.masks,
        dataset.image_lines,
        dataset.not_kept,
        dataset.summary(),
    ]
