"""Some of an image's objects, or those of several images: whatever a table of objects holds.

Such a table is a `collate.RasterisedObjects`: arrays with a row for each object, and beside them bitmaps and
polygons end to end.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.polygons import join_polygons, select_polygons

Objects = TypeVar("Objects", bound=Any)


def split_crops(objects: Any) -> list[NDArray[np.uint8]]:
    """The bitmap (h, w) of each object, as views."""
    sizes = objects.windows[:, [3, 2]].astype(np.int64)
    ends = np.cumsum(sizes.prod(axis=1))[:-1]
    parts = np.split(objects.crops, ends) if len(sizes) else []
    return [part.reshape(tuple(size)) for part, size in zip(parts, sizes, strict=True)]


def select_objects(
    objects: Objects,
    keep: NDArray[np.int64],
    bitmaps: Mapping[int, NDArray[np.uint8]] | None = None,
) -> Objects:
    """Some of the objects.

    Args:
        bitmaps: by object, what has become of its bitmap; it is the object's mask from now on.
    """
    bitmaps, crops, polygons = bitmaps or {}, split_crops(objects), objects.polygons
    some = {name: value[keep] for name, value in _tables(objects).items()}
    some["crops"] = np.concatenate(
        [np.zeros(0, np.uint8), *(bitmaps.get(i, crops[i]).ravel() for i in keep.tolist())]
    )
    if polygons is not None:
        polygons = select_polygons(polygons, keep, [i not in bitmaps for i in keep.tolist()])
    return objects._replace(**some, polygons=polygons)


def join_objects(parts: Sequence[Objects]) -> Objects:
    """The objects of several images, each in pixels of its own annotation."""
    tables = [_tables(part) | {"crops": part.crops} for part in parts]
    joined = {name: np.concatenate([each[name] for each in tables]) for name in tables[0]}
    polygons = [part.polygons for part in parts if part.polygons is not None]
    return parts[0]._replace(**joined, polygons=join_polygons(polygons) if polygons else None)


def _tables(objects: Objects) -> dict[str, NDArray[Any]]:
    """What has a row for each object, by name."""
    fields = objects._asdict().items()
    return {name: value for name, value in fields if isinstance(value, np.ndarray) and name != "crops"}
