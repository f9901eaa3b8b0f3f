"""Classes of two files are matched by name, whatever their order and ids."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.same_classes import align_classes, check_same_classes, match_classes
from fastmrcnn.errors import UserError


def read(folder: Path, *categories: tuple[int, str], name: str = "set.json") -> CocoDataset:
    """One image, on which each category has an object, in the order given."""
    (folder / "images").mkdir(exist_ok=True)
    Image.new("RGB", (60, 20)).save(folder / "images" / "a.png")
    square = [4, 4, 12, 4, 12, 12, 4, 12]
    tree: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "a.png", "width": 60, "height": 20}],
        "categories": [{"id": number, "name": label} for number, label in categories],
        "annotations": [
            {
                "id": i + 1,
                "image_id": 1,
                "category_id": number,
                "bbox": [4, 4, 8, 8],
                "segmentation": [square],
                "area": 64,
                "iscrowd": 0,
            }
            for i, (number, _) in enumerate(categories)
        ],
    }
    (folder / name).write_text(json.dumps(tree), encoding="utf-8")
    return read_coco(folder / "images", folder / name)


def classes_of(dataset: CocoDataset) -> list[str]:
    """The class of each object by its index."""
    return [dataset.class_names[item.class_index] for record in dataset.records for item in record.objects]


@pytest.mark.parametrize(
    ("own", "known", "expected"),
    [
        ([("a", 1), ("b", 2)], [("a", 1), ("b", 2)], [0, 1]),
        ([("a", 1), ("b", 2)], [("b", 1), ("a", 2)], [1, 0]),
        ([("a", 7), ("c", 1)], [("b", 1), ("a", 2)], [1, None]),
        ([("a", 1), ("a", 2)], [("a", 2), ("a", 1)], [1, 0]),
        ([("a", 1), ("a", 3)], [("a", 1), ("a", 2)], [0, None]),
        ([("a", 2)], [("a", 1), ("a", 2)], [1]),
        ([("a", 3)], [("a", 1), ("a", 2)], [None]),
        ([("a", 1), ("a", 2)], [("a", 2)], [None, 0]),
    ],
)
def test_match(own: Any, known: Any, expected: Any) -> None:
    names, ids = zip(*own, strict=True)
    known_names, known_ids = zip(*known, strict=True)
    assert match_classes(names, ids, known_names, known_ids) == expected


def test_the_validation_set_may_lack_classes(tmp_path: Path) -> None:
    train = read(tmp_path, (3, "cat"), (90, "dog"))
    part = read(tmp_path, (90, "dog"), name="val.json")
    assert part.records[0].objects[0].class_index == 0
    aligned = check_same_classes(train, part)
    assert aligned.records[0].objects[0].class_index == 1
    assert (aligned.class_names, aligned.category_ids) == (["cat", "dog"], [3, 90])
    assert len(aligned.summary()) == 1
    assert check_same_classes(train, train) is train


def test_other_ids_are_matched_by_name_and_said(tmp_path: Path) -> None:
    train = read(tmp_path, (1, "cat"), (2, "dog"), (3, "emu"))
    val = read(tmp_path, (1, "emu"), (2, "dog"), (9, "cat"), name="val.json")
    aligned = check_same_classes(train, val)
    assert aligned.class_names == ["cat", "dog", "emu"]
    assert aligned.category_ids == [9, 2, 1]  # what results are written with: those of the file
    assert classes_of(aligned) == ["emu", "dog", "cat"]
    assert aligned.summary()[1] == (
        f"val.json: classes are matched with {tmp_path / 'set.json'} by name, since their ids differ: "
        "'cat' is 9 here, 1 there, 'emu' is 1 here, 3 there"
    )
    assert check_same_classes(train, aligned).category_ids == [9, 2, 1]


def test_an_id_that_another_class_has_taken(tmp_path: Path) -> None:
    """A class that the file lacks must not come out under the id of one that it has."""
    train = read(tmp_path, (1, "cat"), (2, "dog"))
    val = read(tmp_path, (1, "dog"), name="val.json")
    aligned = check_same_classes(train, val)
    assert (aligned.category_ids, classes_of(aligned)) == ([3, 1], ["dog"])


def test_names_that_are_there_twice_need_their_ids(tmp_path: Path) -> None:
    known = (["cat", "cat", "dog"], [1, 2, 3])
    both = align_classes(read(tmp_path, (1, "cat"), (2, "cat")), *known, "there")
    assert [item.class_index for item in both.records[0].objects] == [0, 1]
    with pytest.raises(UserError, match=r"category 'cat' has id 5 here and 1, 2 there.*together with its id"):
        align_classes(read(tmp_path, (5, "cat")), *known, "there")


@pytest.mark.parametrize(
    ("category", "words"),
    [
        ((4, "cow"), "category 4 'cow' is not there"),
        ((3, "cow"), "category 3 is 'cow' here, but 'cat' there"),
    ],
)
def test_a_class_that_is_not_there(tmp_path: Path, category: tuple[int, str], words: str) -> None:
    train = read(tmp_path, (3, "cat"), (90, "dog"))
    other = read(tmp_path, (90, "dog"), category, name="val.json")
    with pytest.raises(UserError, match=r"val\.json: its categories do not match .*set\.json") as caught:
        check_same_classes(train, other)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
