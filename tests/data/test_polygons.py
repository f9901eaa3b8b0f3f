"""Polygons in batches: what the tables hold, and that flips and scales change the map alone."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.polygons import PolygonSizes, largest_polygons, polygon_tables, read_polygons
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.data.shapes import write_shapes
from fastmrcnn.data.transforms import Augment
from fastmrcnn.structures import PackedPolygons

SQUARE = [1.5, 2, 9.25, 2, 9.25, 12, 1.5, 12]
TRIANGLE = [20.0, 20, 30, 20, 25, 31.125]
RLE = coco_mask.encode(np.asfortranarray(np.eye(40, dtype=np.uint8)))


def record(*segmentations: object, crowd: bool = False) -> ImageRecord:
    objects = [ObjectRecord(1, 0, (0, 0, 40, 40), crowd, one, 1) for one in segmentations]
    return ImageRecord(1, Path("x.png"), "x.png", 40, 40, objects, Path("set.json"))


def polygons_of(packed: PackedPolygons, image: int, slot: int) -> list[list[float]]:
    """An object's polygons, read back as the operator reads them."""
    first, count = int(packed.first_part[image, slot]), int(packed.parts[image, slot])
    starts = packed.part_start[first : first + count + 1].tolist()
    return [packed.vertices[a:b].flatten().tolist() for a, b in pairwise(starts)]


def test_tables_hold_each_objects_polygons() -> None:
    images = [
        read_polygons(record([SQUARE, TRIANGLE], RLE, [TRIANGLE])),
        read_polygons(record()),
        read_polygons(record([SQUARE], crowd=True)),
        read_polygons(record(None, [np.array(SQUARE)])),
    ]
    affines = [np.array([[scale, 0, 0], [0, 1, 3]]) for scale in (1.0, 2.0, 3.0, 4.0)]
    packed = polygon_tables(images, affines, 4, PolygonSizes(1, 1, 1))
    assert polygons_of(packed, 0, 0) == [SQUARE, TRIANGLE]
    assert polygons_of(packed, 0, 1) == []  # RLE
    assert polygons_of(packed, 0, 2) == [TRIANGLE]
    assert polygons_of(packed, 2, 0) == []  # a crowd
    assert polygons_of(packed, 3, 0) == []
    assert polygons_of(packed, 3, 1) == [SQUARE]
    assert packed.parts.sum() == 4
    assert packed.to_input.tolist() == np.stack(affines).tolist()
    assert packed.vertices.shape == (16, 2)  # of 4 + 3 + 3 + 4
    assert packed.part_start.tolist() == [0, 4, 7, 10, 14]
    assert packed.step.tolist() == list(range(8))  # the first object has 7 vertices


def test_images_without_polygons() -> None:
    packed = polygon_tables([read_polygons(record())] * 2, [np.eye(2, 3)] * 2, 8, PolygonSizes())
    assert not packed.parts.any()
    assert packed.vertices.shape == (256, 2)
    assert packed.part_start.tolist() == [0] * 33
    assert packed.step.shape == (32,)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    paths = write_shapes(tmp_path_factory.mktemp("shapes"), seed=3, train=10, val=1, size=48)
    return read_coco(paths["train_images"], paths["train_annotations"])


def test_loader_carries_them_through_every_change(shapes: CocoDataset) -> None:
    """Moved into the input, an object's vertices span its box, to two pixels and up to the border."""
    augment = Augment(flip_horizontal=0.5, flip_vertical=0.5, rotate90=0.5)
    sizes = largest_polygons(shapes, 3)
    options = {"batch": 3, "short_sides": [40, 44], "long_side_max": 96, "augment": augment, "steps": 8}
    shapes_seen = set()
    compared = 0
    for loaded in TrainLoader(shapes, polygons=sizes, **options):
        targets = loaded.batch.targets
        assert targets is not None
        packed = targets.polygons
        assert packed is not None
        shapes_seen.add(tuple(tuple(table.shape) for table in packed))
        assert packed.vertices.dtype == packed.to_input.dtype == torch.float64
        assert packed.part_start.dtype == packed.first_part.dtype == packed.parts.dtype == torch.int32
        for image, slot in targets.valid.nonzero().tolist():
            polygons = polygons_of(packed, image, slot)
            if not polygons:  # some shapes are annotated by RLE
                continue
            points = torch.tensor(polygons[0], dtype=torch.float64).reshape(-1, 2)
            moved = points @ packed.to_input[image, :, :2].T + packed.to_input[image, :, 2]
            height, width = loaded.batch.sizes[image].tolist()
            corners = torch.cat([moved.amin(0), moved.amax(0)])
            corners = corners.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
            torch.testing.assert_close(corners.float(), targets.boxes[image, slot], rtol=0, atol=2.0)
            compared += 1
    assert compared > 20
    assert len(shapes_seen) == 1


def test_left_out_unless_asked_for(shapes: CocoDataset) -> None:
    loaded = next(iter(TrainLoader(shapes, batch=2, short_sides=[48], long_side_max=48, steps=1)))
    assert loaded.batch.targets is not None
    assert loaded.batch.targets.polygons is None


def test_one_large_image_does_not_set_the_size_of_all_batches() -> None:
    many = [record([SQUARE]) for _ in range(1000)]
    assert largest_polygons(CocoDataset(many, ["a"], [1], Path("set.json")), 200) == (800, 200, 32)
    many[7] = record([SQUARE * 1000])
    vertices, parts, longest = largest_polygons(CocoDataset(many, ["a"], [1], Path("set.json")), 200)
    assert 800 < vertices < 200 * 4000 / 10
    assert parts == 200
    assert longest == 4000
