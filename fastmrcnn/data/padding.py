"""What the targets of images need of a padded batch, known before any of them is read.

Processes that share out the images of a step pad each its own part, and have to come to the same shapes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.extents import mask_extents
from fastmrcnn.data.order import Floors
from fastmrcnn.data.polygons import PolygonSizes


def target_needs(dataset: CocoDataset, polygons: bool) -> NDArray[np.int64]:
    """Of each image (n, 3): bytes of its objects' bitmaps at most, vertices and parts of its polygons.

    Args:
        polygons: whether those are wanted; else the last two are 0.
    """
    needs = np.zeros((len(dataset.records), len(Floors._fields)), np.int64)
    if dataset.masks:
        needs[:, 0] = _bitmap_bytes(dataset)
    if polygons:
        for row, record in zip(needs, dataset.records, strict=True):
            for item in record.objects:
                if isinstance(item.segmentation, list) and not item.crowd:
                    row[1] += sum(len(polygon) // 2 for polygon in item.segmentation)
                    row[2] += len(item.segmentation)
    return needs


def _bitmap_bytes(dataset: CocoDataset) -> NDArray[np.int64]:
    """An object's bitmap is the window of its mask; a polygon's may reach a pixel beyond its vertices."""
    owners, shapes, heights, widths = [], [], [], []
    for index, record in enumerate(dataset.records):
        for item in record.objects:
            if item.segmentation and not item.crowd:
                owners.append(index)
                shapes.append(item.segmentation)
                heights.append(record.height)
                widths.append(record.width)
    extents, _ = mask_extents(shapes, heights, widths)
    sizes = np.array([widths, heights], np.float64).reshape(2, -1).T
    low = np.clip(np.floor(extents[:, :2]) - 1, 0, sizes)
    high = np.clip(np.ceil(extents[:, 2:]) + 1, 0, sizes)
    areas = np.nan_to_num(np.prod(np.maximum(high - low, 0), axis=1)).astype(np.int64)
    return np.bincount(owners, areas, minlength=len(dataset.records)).astype(np.int64)


def raised(least: PolygonSizes | None, floors: Floors) -> PolygonSizes | None:
    """Lower limits of the tables of polygons, where the images of a step need more."""
    if least is None:
        return None
    return least._replace(vertices=max(least.vertices, floors.vertices), parts=max(least.parts, floors.parts))
