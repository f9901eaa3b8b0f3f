"""What the targets of images need of a padded batch, known before any of them is read.

Processes that share out the images of a step pad each its own part, and have to come to the same shapes.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.order import Floors
from fastmrcnn.data.polygons import PolygonSizes, polygon_counts


def target_needs(dataset: CocoDataset, polygons: bool, layers: int = 1) -> NDArray[np.int64]:
    """Of each image (n, 3): bytes of its objects' bitmaps at most, vertices and parts of its polygons.

    Args:
        polygons: whether those are wanted; else the last two are 0.
        layers: most images that a sample may be put together from, of which the others may be any.
    """
    records = flat_records(dataset.records)
    objects = records.objects
    needs = np.zeros((len(records), len(Floors._fields)), np.int64)
    if dataset.masks:
        needs[:, 0] = records.per_image(np.where(objects["crowd"], 0, objects["bitmap_bytes"]))
    if polygons:
        needs[:, 1], needs[:, 2], _ = polygon_counts(records)
    return needs + (layers - 1) * needs.max(axis=0, initial=0)


def raised(least: PolygonSizes | None, floors: Floors) -> PolygonSizes | None:
    """Lower limits of the tables of polygons, where the images of a step need more."""
    if least is None:
        return None
    return least._replace(vertices=max(least.vertices, floors.vertices), parts=max(least.parts, floors.parts))
