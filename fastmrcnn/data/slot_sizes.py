"""How many bytes hold the tensors of a batch. One that needs more is handed over without a slot."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fastmrcnn.data.buckets import power_of_two
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat_records import flat_records
from fastmrcnn.data.polygons import PolygonSizes
from fastmrcnn.data.raw_images import MIN_BYTES, MOST_PIXELS
from fastmrcnn.data.transforms import Size


def pixel_bytes(dataset: CocoDataset, batch: int, buckets: Sequence[Size], raw: bool) -> int:
    """Of a batch's images: padded, or raw ones, which hardly ever need more."""
    padded = 3 * batch * max(height * width for height, width in buckets)
    if not raw or not len(dataset.records):
        return padded
    areas = 3 * flat_records(dataset.records).sizes.astype(np.float64).prod(axis=1)
    usual = batch * areas.mean() + 6 * math.sqrt(batch) * areas.std()
    most = min(usual, batch * areas.max(), MOST_PIXELS * padded)
    return power_of_two(max(int(most), MIN_BYTES))


def table_bytes(
    batch: int, slots: int, mask_bytes: int, keypoints: int = 0, polygons: PolygonSizes | None = None
) -> int:
    """Of everything else.

    Args:
        slots: of ground truth or of proposals.
        mask_bytes, polygons: as of `TrainLoader`.
        keypoints: J.
    """
    outlines = 0
    if polygons is not None:
        vertices, parts, longest = (power_of_two(size) for size in polygons)
        outlines = 16 * vertices + 4 * parts + 4 * longest
    tables = batch * power_of_two(slots) * (64 + 12 * keypoints)
    return power_of_two(mask_bytes) + tables + outlines + 2**14 + 256 * batch
