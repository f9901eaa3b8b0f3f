"""Polygons of a batch's objects, for mask targets that are rasterised at the RoI's resolution."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fastmrcnn.data.buckets import power_of_two
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.flat import POLYGONS
from fastmrcnn.data.flat_records import FlatRecords, flat_records
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.structures import PackedPolygons


class ImagePolygons(NamedTuple):
    """The polygons of an image's objects, end to end. Objects annotated by RLE, and crowds, have none."""

    vertices: NDArray[np.float64]  # (v, 2) in annotation pixels
    lengths: NDArray[np.int32]  # (p,) vertices of each polygon
    parts: NDArray[np.int32]  # (n,) polygons of each object
    longest: int  # most vertices of an object


class PolygonSizes(NamedTuple):
    """Lower limits of the padded sizes, for equal shapes."""

    vertices: int = 256
    parts: int = 32
    longest: int = 32


def read_polygons(record: ImageRecord) -> ImagePolygons:
    """The polygons of an image's objects, as they are annotated."""
    objects = [
        [np.asarray(polygon, np.float64).reshape(-1, 2) for polygon in _polygons(item)]
        for item in record.objects
    ]
    lengths = [[len(polygon) for polygon in polygons] for polygons in objects]
    return ImagePolygons(
        vertices=np.concatenate([np.zeros((0, 2)), *(polygon for some in objects for polygon in some)]),
        lengths=np.array([length for some in lengths for length in some], np.int32),
        parts=np.array([len(some) for some in lengths], np.int32),
        longest=max((sum(some) for some in lengths), default=0),
    )


def select_polygons(image: ImagePolygons, keep: NDArray[np.int64], usable: Sequence[bool]) -> ImagePolygons:
    """Those of some of an image's objects; none of one whose polygons are not usable."""
    first = np.cumsum(image.parts) - image.parts
    last_vertex = np.cumsum(image.lengths)
    parts = [
        range(first[i], first[i] + image.parts[i]) if use else range(0)
        for i, use in zip(keep.tolist(), usable, strict=True)
    ]
    chosen = [part for some in parts for part in some]
    vertices = [image.vertices[last_vertex[p] - image.lengths[p] : last_vertex[p]] for p in chosen]
    return ImagePolygons(
        vertices=np.concatenate([np.zeros((0, 2)), *vertices]),
        lengths=image.lengths[np.array(chosen, np.int64)],
        parts=np.array([len(some) for some in parts], np.int32),
        longest=max((int(image.lengths[np.array(some, np.int64)].sum()) for some in parts), default=0),
    )


def join_polygons(images: Sequence[ImagePolygons]) -> ImagePolygons:
    """Those of all objects of some images."""
    return ImagePolygons(
        vertices=np.concatenate([image.vertices for image in images]),
        lengths=np.concatenate([image.lengths for image in images]),
        parts=np.concatenate([image.parts for image in images]),
        longest=max(image.longest for image in images),
    )


def polygon_tables(
    images: Sequence[ImagePolygons],
    to_input: Sequence[NDArray[np.float64]],
    slots: int,
    least: PolygonSizes,
) -> PackedPolygons:
    """One table of the polygons of all images; every size is a power of two.

    Args:
        to_input: of each image (2, 3), annotation pixels to input pixels; or of its objects (G, 2, 3).
        slots: G.
    """
    vertices = np.concatenate([image.vertices for image in images])
    lengths = np.concatenate([image.lengths for image in images])
    longest = power_of_two(max(least.longest, *(image.longest for image in images)))
    table = np.zeros((power_of_two(max(least.vertices, len(vertices))), 2))
    table[: len(vertices)] = vertices
    part_start = np.full(power_of_two(max(least.parts, len(lengths))) + 1, len(vertices), np.int32)
    part_start[0] = 0
    part_start[1 : len(lengths) + 1] = np.cumsum(lengths)
    parts = np.zeros((len(images), slots), np.int32)
    for row, image in zip(parts, images, strict=True):
        row[: len(image.parts)] = image.parts
    before = np.cumsum(parts).reshape(parts.shape) - parts
    return PackedPolygons(
        vertices=torch.from_numpy(table),
        part_start=torch.from_numpy(part_start),
        # an object without polygons starts at 0, so that the tables of equal batches are equal
        first_part=torch.from_numpy(np.where(parts > 0, before, 0).astype(np.int32)),
        parts=torch.from_numpy(parts),
        to_input=torch.from_numpy(np.stack(list(to_input))),
        step=torch.arange(longest, dtype=torch.int32),
    )


def largest_polygons(dataset: CocoDataset, batch: int) -> PolygonSizes:
    """Limits that hardly any batch of the set exceeds: within 6 standard deviations of the mean batch, and
    within `batch` times the largest image."""
    vertices, parts, longest = polygon_counts(flat_records(dataset.records))
    least = PolygonSizes()

    def usual(counts: NDArray[np.int64]) -> int:
        spread = batch * counts.mean() + 6 * math.sqrt(batch) * counts.std()
        return int(min(spread, batch * counts.max()))

    return PolygonSizes(
        max(usual(vertices), least.vertices), max(usual(parts), least.parts), max(longest, least.longest)
    )


def polygon_counts(records: FlatRecords) -> tuple[NDArray[np.int64], NDArray[np.int64], int]:
    """Vertices (n,) and polygons (n,) that there are to learn from in each image, and the most vertices of an
    object."""
    objects = records.objects
    learnt = (objects["shape"] == POLYGONS) & ~objects["crowd"]
    of_object = np.zeros(len(objects), np.int64)
    lengths = records.part_lengths(objects[learnt]) // 2
    # an object of this kind has a polygon, so that none of the stretches is empty
    first = np.cumsum(objects["parts"][learnt]) - objects["parts"][learnt]
    of_object[learnt] = np.add.reduceat(lengths, first) if len(lengths) else 0
    vertices = records.per_image(of_object).astype(np.int64)
    parts = records.per_image(np.where(learnt, objects["parts"], 0)).astype(np.int64)
    return vertices, parts, int(of_object.max(initial=0))


def _polygons(item: ObjectRecord) -> list[NDArray[np.float64]]:
    """Arrays (x1, y1, x2, y2, ...), or an empty list for an object that has none to learn from."""
    return item.segmentation if isinstance(item.segmentation, list) and not item.crowd else []
