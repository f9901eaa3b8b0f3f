"""Records that are made from flat arrays: those that went into them, to the bit."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flat_sets import bits, plain
from pycocotools import mask as coco_mask

from fastmrcnn.data.flat import POLYGONS
from fastmrcnn.data.flat_records import FlatRecords, flat_records
from fastmrcnn.data.masks import bitmap
from fastmrcnn.data.records import ImageRecord, ObjectRecord

HEIGHT, WIDTH = 40, 60


def runs(seed: int) -> dict[str, Any]:
    random = np.random.default_rng(seed)
    return coco_mask.encode(np.asfortranarray(random.random((HEIGHT, WIDTH)) < 0.02 * seed, dtype=np.uint8))


def compressed(seed: int) -> dict[str, Any]:
    return {"size": [HEIGHT, WIDTH], "counts": runs(seed)["counts"].decode()}


def points(*flags: int) -> np.ndarray[Any, Any]:
    return np.array([(1.5 * i, 2.25, flag) for i, flag in enumerate(flags)], np.float32)


def item(number: int, shape: Any, keypoints: Any = None, **others: Any) -> ObjectRecord:
    box = (0.1 * number, 1 / 3, 5e-324, 59.99999999999999)
    return ObjectRecord(number, number % 7, box, number % 3 == 0, shape, 0.1 + number, keypoints, **others)


def records() -> list[ImageRecord]:
    """Every kind of segmentation, images without objects at the ends and in between, odd names and ids."""
    polygon = np.array([1.5, 2, -0.0, 4, 5, 1e-310])
    shapes = [
        [],
        [[polygon], [polygon, polygon[::-1].copy(), np.arange(8.0)], None],
        [compressed(n) for n in range(1, 18)],
        [[], []],
        [{"size": [HEIGHT, WIDTH], "counts": [0, HEIGHT * WIDTH]}, [polygon], None, compressed(3)],
        [],
    ]
    names = ["a.png", "Bär/图像 🦌.png", "a\0b", "x" * 300, "odd \ud800.png", "C:\\b.png"]
    found = []
    for index, (name, some) in enumerate(zip(names, shapes, strict=True)):
        objects = [
            item(100 * index + n + 1, shape or None, points(0, 2, 1) if n % 2 and index != 4 else None)
            for n, shape in enumerate(some)
        ]
        image_id = [0, -5, 2**53, 7, -(2**53), 1][index]
        path = Path("images") / name
        found.append(ImageRecord(image_id, path, name, WIDTH, HEIGHT, objects, Path("set.json")))
    return found


def test_they_are_what_went_in() -> None:
    before = records()
    after = flat_records(before)
    assert [plain(one) for one in after] == [plain(one) for one in before]
    assert len(after) == 6
    assert plain(after[-2]) == plain(before[4])
    assert [plain(one) for one in after[1:4]] == [plain(one) for one in before[1:4]]
    with pytest.raises(IndexError, match="record 6 of 6"):
        after[6]
    with pytest.raises(IndexError, match="record -7 of 6"):
        after[-7]
    assert flat_records(after) is after


def test_columns_are_those_of_the_records() -> None:
    before = records()
    order = np.array([4, 2, 0, 1])
    for after, some in ((flat_records(before), before), (flat_records(before).chosen(order), None)):
        some = some or [before[index] for index in order]
        items = [one for record in some for one in record.objects]
        assert [plain(one) for one in after] == [plain(one) for one in some]
        assert after.image_ids.tolist() == [one.image_id for one in some]
        assert after.sizes.tolist() == [[HEIGHT, WIDTH]] * len(some)
        assert after.object_counts.tolist() == [len(one.objects) for one in some]
        assert after.file_names == [one.file_name for one in some]
        assert after.paths == [str(one.path) for one in some]
        assert after.objects["annotation_id"].tolist() == [one.annotation_id for one in items]
        assert after.objects["crowd"].tolist() == [one.crowd for one in items]
        assert list(map(tuple, after.objects["box"].tolist())) == [one.box for one in items]
        owners = [place for place, record in enumerate(some) for _ in record.objects]
        assert after.image_of.tolist() == owners
        sums = [sum(one.area for one in record.objects) for record in some]
        np.testing.assert_allclose(after.per_image(after.objects["area"]), sums)
        labelled = [sum(2 for one in record.objects if one.keypoints is not None) for record in some]
        assert after.labelled_keypoints.tolist() == labelled
        polygons = after.objects[after.objects["shape"] == POLYGONS]
        lengths = [len(p) for one in items if isinstance(one.segmentation, list) for p in one.segmentation]
        assert after.part_lengths(polygons).tolist() == lengths


def test_no_bitmap_has_more_bytes_than_are_said() -> None:
    random = np.random.default_rng(2)
    low = random.uniform(-20, 60, (60, 1, 2))
    polygons = [[one.ravel()] for one in low + random.uniform(0, 30, (60, 5, 2))]
    shapes = [*polygons, *map(compressed, range(1, 12)), None]
    image = ImageRecord(
        1, Path("a.png"), "a.png", WIDTH, HEIGHT, list(map(item, range(72), shapes)), Path("x")
    )
    most = flat_records([image]).objects["bitmap_bytes"].tolist()
    used = [bitmap(shape, HEIGHT, WIDTH)[0].size for shape in shapes]
    assert all(one <= other for one, other in zip(used, most, strict=True))
    # and hardly more: two pixels on each side, unless a part of the polygon that is outside was counted
    sides = [bitmap(shape, HEIGHT, WIDTH)[1][2:] for shape in shapes[60:]]
    near = [(w + 4) * (h + 4) if w else 0 for w, h in sides]
    assert all(one <= other for one, other in zip(most[60:], near, strict=True))
    assert sum(most[:60]) < 2 * sum(used[:60])


def test_other_places_classes_and_ways_to_read() -> None:
    before = flat_records(records()).chosen(np.array([False, True, True, False, True, True]))
    after = before.found_at({1: "elsewhere/2.png"}).renumbered([6, 5, 4, 3, 2, 1, 0])
    assert [str(one.path) for one in after][:2] == ["images/Bär/图像 🦌.png", "elsewhere/2.png"]
    assert after.chosen(np.array([1])).paths == ["elsewhere/2.png"]
    for one, other in zip(before, after, strict=True):
        assert [6 - o.class_index for o in one.objects] == [o.class_index for o in other.objects]
    again = after.renumbered([1, 0, 2, 3, 4, 5, 6])
    assert [o.class_index for o in again[0].objects] == [3, 2, 0]
    assert [o.class_index for o in after[0].objects] == [3, 2, 1]  # not changed by what was made from it


def test_objects_are_a_sequence_like_a_list() -> None:
    record = flat_records(records())[1]
    assert len(record.objects) == 3
    assert record.objects[0] is record.objects[0]
    assert [one.annotation_id for one in record.objects[1:]] == [102, 103]
    assert pickle.loads(pickle.dumps(record.objects[2])) == record.objects[2]
    copied = pickle.loads(pickle.dumps(record))
    assert type(copied.objects) is list
    assert plain(copied) == plain(record)
    nothing = flat_records(records())[0]
    assert nothing.objects == []
    assert copy.deepcopy(nothing) == nothing
    assert not nothing.objects


def test_arrays_of_an_object_are_its_own() -> None:
    """Whoever writes into one changes no other; and torch warns of arrays that must not be written to."""
    after = flat_records(records())
    polygon = after[1].objects[1].segmentation[0]
    assert bits(polygon)[3]


def test_none_at_all() -> None:
    empty = flat_records([])
    assert isinstance(empty, FlatRecords)
    assert (len(empty), list(empty), empty.file_names, empty.paths) == (0, [], [], [])
    assert len(empty.objects) == len(empty.image_of) == len(empty.labelled_keypoints) == 0
