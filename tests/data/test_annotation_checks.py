"""What is seen of a whole file: each kind of mistake with its count, its likely reason and the way out."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.errors import UserError

HEIGHT, WIDTH = 64, 96
BOXES = [
    (4, 6, 20, 14),
    (40, 2, 16, 24),
    (8, 26, 15, 12),
    (50, 20, 22, 18),
    (30, 44, 12, 16),
    (70, 4, 18, 11),
]


def polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def tree(count: int = len(BOXES)) -> dict[str, Any]:
    """One image, an object for each of the boxes."""
    return {
        "images": [{"id": 0, "file_name": "a.png", "width": WIDTH, "height": HEIGHT}],
        "categories": [{"id": 1, "name": "cell"}],
        "annotations": [
            {
                "id": number,
                "image_id": 0,
                "category_id": 1,
                "bbox": list(box),
                "area": box[2] * box[3],
                "iscrowd": 0,
                "segmentation": polygon(*box),
            }
            for number, box in enumerate(BOXES[:count], start=1)
        ],
    }


def read(folder: Path, content: Any, **options: Any) -> CocoDataset:
    Image.new("RGB", (WIDTH, HEIGHT)).save(folder / "a.png")
    (folder / "set.json").write_text(json.dumps(content))
    return read_coco(folder, folder / "set.json", **options)


def told(folder: Path, content: Any, *words: str, **options: Any) -> CocoDataset:
    """The set, one line of whose summary has all the words."""
    dataset = read(folder, content, **options)
    lines = dataset.summary()[1:]
    assert any(all(word in line for word in words) for line in lines), lines
    return dataset


def refused(folder: Path, content: Any, *words: str, **options: Any) -> None:
    with pytest.raises(UserError) as caught:
        read(folder, content, **options)
    message = str(caught.value)
    assert message.startswith(str(folder / "set.json"))
    assert "\n" not in message
    for word in words:
        assert word in message


def each(content: dict[str, Any], change: Callable[[dict[str, Any]], Any], count: int | None = None) -> Any:
    for entry in content["annotations"][:count]:
        change(entry)
    return content


def test_a_sound_file_has_no_findings(tmp_path: Path) -> None:
    """An image id of 0 is as good as any."""
    dataset = read(tmp_path, tree())
    assert dataset.summary() == ["set.json: 1 image, 6 objects, 1 class"]
    assert dataset.records[0].objects[0].box == (4, 6, 24, 20)


def moved(entry: dict[str, Any], change: Callable[[float], float]) -> None:
    entry["segmentation"] = [[change(value) for value in part] for part in entry["segmentation"]]


FAR: list[tuple[Callable[[float], float], str]] = [
    (lambda v: -v - 5, "they lie outside of the image"),
    (lambda v: v + 1000, "masks lie +1000, +1000 pixels from the boxes"),
    (lambda v: v / 1000, "covers no pixel"),
]


@pytest.mark.parametrize(("change", "reason"), FAR)
def test_masks_that_cover_no_pixel(tmp_path: Path, change: Any, reason: str) -> None:
    content = each(tree(), lambda e: moved(e, change))
    words = ("6 of 6 objects have a mask that covers no pixel", "annotation 1, 2, 3, ...", reason)
    refused(tmp_path, content, *words)
    content = each(tree(), lambda e: moved(e, change), 2)
    dataset = told(tmp_path, content, "left out 2 objects whose mask covers no pixel (annotations 1, 2)")
    assert [item.crowd for item in dataset.records[0].objects] == [False] * 4
    empty = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * WIDTH]}
    told(tmp_path, each(tree(), lambda e: e.update(segmentation=empty), 1), "left out 1 object whose mask")


def fractions(entry: dict[str, Any], factor: float = 1) -> None:
    flat = entry["segmentation"][0]
    entry["segmentation"] = [[factor * v / (HEIGHT if i % 2 else WIDTH) for i, v in enumerate(flat)]]


def relative_box(entry: dict[str, Any], factor: float = 1) -> None:
    x, y, w, h = (factor * v for v in entry["bbox"])
    entry["bbox"] = [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


def set_box(
    change: Callable[[float, float, float, float], tuple[float, ...]],
) -> Callable[[dict[str, Any]], None]:
    return lambda entry: entry.update(bbox=list(change(*entry["bbox"])))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (set_box(lambda x, y, w, h: (x, HEIGHT - y - h, w, h)), "counts y from the bottom"),
        (set_box(lambda x, y, w, h: (WIDTH - x - w, y, w, h)), "counts x from the right"),
        (set_box(lambda x, y, w, h: (WIDTH - x - w, HEIGHT - y - h, w, h)), "turned by half a turn"),
        (set_box(lambda x, y, w, h: (x, y, x + w, y + h)), "bbox holds [x1, y1, x2, y2]"),
        (set_box(lambda x, y, w, h: (x + w / 2, y + h / 2, w, h)), "bbox holds the centre"),
        (set_box(lambda x, y, w, h: (y, x, h, w)), "x and y are exchanged"),
        (set_box(lambda x, y, w, h: (x + 9, y - 7, w, h)), "masks lie -9, +7 pixels from the boxes"),
        (set_box(lambda x, y, w, h: (x / 2, y / 2, w / 2, h / 2)), "another size of the image"),
        (lambda entry: fractions(entry, 100), "masks look like percent"),
        (lambda entry: relative_box(entry, 100), "boxes look like percent"),
    ],
)
def test_boxes_that_are_not_those_of_their_masks(tmp_path: Path, change: Any, reason: str) -> None:
    way_out = "correct them" if reason.startswith("masks look") else "data.boxes=masks"
    refused(tmp_path, each(tree(), change), "objects have a bbox that is not", reason, way_out)
    told(tmp_path, each(tree(), change, 3), "whose bbox is not the box of its mask", reason, way_out)


def test_boxes_in_fractions_are_named(tmp_path: Path) -> None:
    refused(tmp_path, each(tree(), relative_box), "skipped 6 boxes with a side under 1 px",
            "boxes look like fractions of the image")  # fmt: skip

    def alone(entry: dict[str, Any]) -> None:
        relative_box(entry)
        del entry["segmentation"]

    refused(tmp_path, each(tree(), alone), "boxes look like fractions of the image", require_masks=False)


def test_boxes_drawn_by_hand_are_no_finding(tmp_path: Path) -> None:
    loose = set_box(lambda x, y, w, h: (x - 1, y - 1, w + 2, h + 1.5))
    assert len(read(tmp_path, each(tree(), loose)).summary()) == 1


def test_boxes_from_masks(tmp_path: Path) -> None:
    wrong = each(tree(), set_box(lambda x, y, w, h: (y, x, h, w)))
    del wrong["annotations"][0]["bbox"]
    runs = {"size": [HEIGHT, WIDTH], "counts": [HEIGHT * 10 + 5, 20, HEIGHT * (WIDTH - 10) - 25]}
    wrong["annotations"][1]["segmentation"] = runs
    dataset = read(tmp_path, wrong, boxes="masks", keep_tree=True)
    assert [item.box for item in dataset.records[0].objects[:3]] == [
        (4, 6, 24, 20), (10, 5, 11, 25), (8, 26, 23, 38),
    ]  # fmt: skip
    assert dataset.tree is not None
    assert [entry["bbox"] for entry in dataset.tree["annotations"][:2]] == [[4, 6, 20, 14], [10, 5, 1, 20]]
    refused(tmp_path, wrong, "annotation 1: bbox None is not four finite numbers", "data.boxes=masks")


@pytest.mark.parametrize("area", ["280", -1, 0, 1, float("nan"), True, None, "many", 1e12, [], 280 * 40])
def test_areas_that_cannot_be(tmp_path: Path, area: Any) -> None:
    content = tree()
    content["annotations"][0]["area"] = area
    dataset = read(tmp_path, content, keep_tree=True)
    assert dataset.records[0].objects[0].area == 280
    assert dataset.tree is not None
    assert dataset.tree["annotations"][0]["area"] == 280
    lines = dataset.summary()[1:]
    if area is None:
        assert not lines
    elif area == "280":
        assert lines == ["set.json: 1 object with area given as text (annotation 1); taken for the number it "
                         "stands for"]  # fmt: skip
    else:
        assert lines == [
            "set.json: 1 object whose area is not that of its mask (annotation 1); measured anew"
        ]


def test_a_thin_object_keeps_its_small_area(tmp_path: Path) -> None:
    content = tree()
    content["annotations"][0] |= {"bbox": [10, 4, 50, 50], "area": 40.0,
                                  "segmentation": [[10, 4, 60, 54, 60, 54.8, 10, 4.8]]}  # fmt: skip
    dataset = read(tmp_path, content)
    assert dataset.records[0].objects[0].area == 40
    assert len(dataset.summary()) == 1


@pytest.mark.parametrize(
    ("given", "crowd"), [("1", True), ("0", False), (True, True), (1.0, True), (None, False)]
)
def test_iscrowd_in_other_words(tmp_path: Path, given: Any, crowd: bool) -> None:
    content = tree()
    content["annotations"][0]["iscrowd"] = given
    dataset = read(tmp_path, content, keep_tree=True)
    assert [item.crowd for item in dataset.records[0].objects] == [crowd] + [False] * 5
    assert dataset.tree is not None
    assert type(dataset.tree["annotations"][0]["iscrowd"]) is int
    content["annotations"][0]["iscrowd"] = "perhaps"
    refused(tmp_path, content, "annotation 1: iscrowd is 'perhaps', not 0 or 1")


def test_numbers_as_text(tmp_path: Path) -> None:
    content = tree()
    content["images"][0] |= {"id": "0", "width": "96", "height": "64.0"}
    content["categories"][0]["id"] = "1"

    def as_text(entry: dict[str, Any]) -> None:
        entry.update(image_id="0", category_id="1.0", bbox=[str(side) for side in entry["bbox"]])
        entry["segmentation"] = [[str(value) for value in part] for part in entry["segmentation"]]

    plain = read(tmp_path, tree(), keep_tree=True)
    dataset = told(tmp_path, each(content, as_text), "6 objects with bbox given as text", keep_tree=True)
    assert [item.box for item in dataset.records[0].objects] == [
        item.box for item in plain.records[0].objects
    ]
    assert dataset.tree == plain.tree
    text = "\n".join(dataset.summary())
    for key in ("image_id", "category_id", "segmentation", "width", "height", "an id"):
        assert f"with {key} given as text" in text


def test_keypoints_are_counted_by_their_flags(tmp_path: Path) -> None:
    for given in (0, 3, "2", -1, True, None):
        content = tree()
        content["categories"][0]["keypoints"] = ["a", "b"]
        each(content, lambda e: e.update(keypoints=[9, 9, 2, 12, 9, 1], num_keypoints=given))  # noqa: B023
        words = ("6 objects whose num_keypoints is not the number", "counted by the flags")
        dataset = told(tmp_path, content, *words, keypoints=KeypointOptions(), keep_tree=True)
        assert dataset.tree is not None
        assert {entry["num_keypoints"] for entry in dataset.tree["annotations"]} == {2}


def test_keypoints_may_be_text(tmp_path: Path) -> None:
    content = tree()
    content["categories"][0]["keypoints"] = ["a", "b"]
    each(content, lambda e: e.update(keypoints=["9", "9.5", "2", "12", "9", "1"]))
    words = ("6 objects with keypoints given as text",)
    dataset = told(tmp_path, content, *words, keypoints=KeypointOptions(offset=0.0))
    points = dataset.records[0].objects[0].keypoints
    assert points is not None
    assert points.tolist() == [[9, 9.5, 2], [12, 9, 1]]


def test_objects_without_a_mask_are_judged_as_regions_with_their_keypoints(tmp_path: Path) -> None:
    content = tree()
    content["categories"][0]["keypoints"] = ["a", "b"]
    each(content, lambda e: e.update(keypoints=[9, 9, 2, 12, 9, 1]))
    content["annotations"][1]["segmentation"] = None
    dataset = told(tmp_path, content, "1 object without a mask", keypoints=KeypointOptions(), keep_tree=True)
    assert dataset.tree is not None
    assert [e["num_keypoints"] for e in dataset.tree["annotations"]] == [2] * 6
    assert sum(e["iscrowd"] for e in dataset.tree["annotations"]) == 1


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([0, 1, 2, 3, 4, 5], "1 object with an id that is not above 0 (annotation 0)"),
        ([7, 7, 7, 8, 9, 10], "2 objects with an id that another has (annotations 7, 7)"),
        ([None] * 6, "6 objects without an id (annotations number 1, number 2, number 3 and 3 more)"),
        (
            ["a", "b", "c", "d", "e", "f"],
            "6 objects with an id that is not a whole number (annotations a, b, c",
        ),
        ([-1, 2, 3, 4, 5, 6], "1 object with an id that is not above 0 (annotation -1)"),
        ([10**30, 2, 3, 4, 5, 6], "1 object with an id that is too large"),
    ],
)
def test_annotations_are_numbered_anew(tmp_path: Path, ids: list[Any], words: str) -> None:
    content = tree()
    for entry, identifier in zip(content["annotations"], ids, strict=True):
        entry["id"] = identifier
        if identifier is None:
            del entry["id"]
    dataset = told(tmp_path, content, words, "numbered anew", keep_tree=True)
    assert [item.annotation_id for item in dataset.records[0].objects] == [1, 2, 3, 4, 5, 6]
    assert dataset.tree is not None
    assert [entry["id"] for entry in dataset.tree["annotations"]] == [1, 2, 3, 4, 5, 6]


def test_the_same_annotation_twice_is_refused(tmp_path: Path) -> None:
    content = tree()
    content["annotations"].append(copy.deepcopy(content["annotations"][2]))
    refused(tmp_path, content, "annotation 3: its id is there twice", "remove one of the two")


def test_crowd_regions_are_named_as_the_reason(tmp_path: Path) -> None:
    content = each(tree(), lambda e: e.update(iscrowd=1))
    refused(
        tmp_path, content, "no image has an object to learn", "6 of 6 objects have iscrowd=1", "set it to 0"
    )
    content["annotations"][0]["iscrowd"] = 0
    told(tmp_path, content, "5 of 6 objects have iscrowd=1", "some programs write it with every RLE")
    each(content, lambda e: e.update(iscrowd=0), 4)
    assert len(read(tmp_path, content).summary()) == 1


def test_objects_without_a_mask(tmp_path: Path) -> None:
    bare = each(tree(), lambda e: e.update(segmentation=[]), 2)
    dataset = told(tmp_path, bare, "left out 2 objects without a mask (annotations 1, 2)",
                   "model.mask_head.enabled=false", keep_tree=True)  # fmt: skip
    assert len(dataset.records[0].objects) == 4
    assert dataset.tree is not None
    assert sorted((e["id"], e["iscrowd"]) for e in dataset.tree["annotations"])[:3] == [
        (1, 1),
        (2, 1),
        (3, 0),
    ]
    refused(tmp_path, each(bare, lambda e: e.update(segmentation=[]), 3), "annotation 1: no segmentation",
            "(the same: 2, 3)", "model.mask_head.enabled=false")  # fmt: skip


def test_entries_with_neither_box_nor_mask(tmp_path: Path) -> None:
    for empty in ({"bbox": [0, 0, 0, 0], "segmentation": []}, {"bbox": []}, {"category_id": None}):
        content = tree()
        content["annotations"].append({"id": 9, "image_id": 0, "category_id": 1, **empty})
        told(tmp_path, content, "left out 1 object with neither box nor mask (annotation 9)")


def test_hundreds_of_one_mistake_are_one_line(tmp_path: Path) -> None:
    content = tree()
    content["annotations"] = [{**content["annotations"][0], "id": i, "image_id": 5} for i in range(1, 301)]
    words = "annotation 1: image_id 5 is not among the images (the same: 2, 3, 4 and 296 more), 300 in all"
    refused(tmp_path, content, words)


def test_two_categories_of_one_name(tmp_path: Path) -> None:
    content = tree()
    content["categories"].append({"id": 2, "name": "cell"})
    content["annotations"][0]["category_id"] = 2
    told(tmp_path, content, "2 categories have the name 'cell'")


def test_a_category_that_only_groups_others_is_no_class(tmp_path: Path) -> None:
    content = tree()
    content["categories"] = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "cell", "supercategory": "cells"},
    ]
    dataset = told(tmp_path, content, "1 category that only groups others and has no object", "(cells)",
                   keep_tree=True)  # fmt: skip
    assert dataset.class_names == ["cell"]
    assert dataset.tree is not None
    assert [category["id"] for category in dataset.tree["categories"]] == [1]
    assert read(tmp_path, content, keep_group_classes=True).class_names == ["cells", "cell"]
    content["annotations"][0]["category_id"] = 0
    assert read(tmp_path, content).class_names == ["cells", "cell"]
    content["categories"] = [{"id": 1, "name": "cell", "supercategory": "cell"}, {"id": 0, "name": "disc"}]
    assert len(read(tmp_path, content).class_names) == 2


def test_hundreds_of_rles(tmp_path: Path) -> None:
    content = tree(1)
    entries = []
    for number in range(1, 301):
        x, y = number % 80, number % 50
        before = HEIGHT * x + y
        runs = [before, 5, HEIGHT - 5, 5, HEIGHT * (WIDTH - 1) - before - 5]
        changes = {
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": runs},
            "area": 10,
            "bbox": [x, y, 2, 5],
        }
        entries.append({**content["annotations"][0], "id": number, **changes})
    dataset = read(tmp_path, content | {"annotations": entries})
    assert dataset.summary() == ["set.json: 1 image, 300 objects, 1 class"]


def test_ignore_of_other_programs_is_told(tmp_path: Path) -> None:
    told(tmp_path, each(tree(), lambda e: e.update(ignore=1), 1), "1 object with ignore set (annotation 1)")
    assert len(read(tmp_path, each(tree(), lambda e: e.update(ignore=0))).summary()) == 1


def points_of(entry: dict[str, Any]) -> list[float]:
    x, y, w, h = entry["bbox"]
    return [x + 2, y + 3, 2, x + w - 3, y + h - 2, 1]


def with_keypoints(
    change: Callable[[dict[str, Any]], list[float]], count: int | None = None
) -> dict[str, Any]:
    """Two keypoints in each box, those of the first `count` objects as `change` makes them."""
    content = tree()
    content["categories"][0]["keypoints"] = ["a", "b"]
    each(content, lambda e: e.update(keypoints=points_of(e)))
    return each(content, lambda e: e.update(keypoints=change(e)), count)


def each_place(
    entry: dict[str, Any], x: Callable[[float], float], y: Callable[[float], float]
) -> list[float]:
    a, b, v, c, d, u = points_of(entry)
    return [x(a), y(b), v, x(c), y(d), u]


def test_keypoints_as_text(tmp_path: Path) -> None:
    plain = read(tmp_path, with_keypoints(points_of), keypoints=KeypointOptions(), keep_tree=True)
    content = with_keypoints(lambda e: [str(value) for value in points_of(e)])
    dataset = told(tmp_path, content, "6 objects with keypoints given as text", keypoints=KeypointOptions())
    for one, other in zip(dataset.records[0].objects, plain.records[0].objects, strict=True):
        assert one.keypoints is not None
        assert other.keypoints is not None
        assert one.keypoints.tolist() == other.keypoints.tolist()
    content["annotations"][0] |= {"keypoints": [], "num_keypoints": "0"}
    dataset = read(tmp_path, content, keypoints=KeypointOptions(), keep_tree=True)
    assert dataset.tree is not None
    assert [entry["num_keypoints"] for entry in dataset.tree["annotations"]] == [0, 2, 2, 2, 2, 2]


def test_keypoints_within_reach_of_their_boxes_are_no_finding(tmp_path: Path) -> None:
    """Hands reach beyond the box of what is seen; what is not labelled stands at 0, 0."""
    content = with_keypoints(lambda e: [e["bbox"][0] - 4, e["bbox"][1], 1, 0, 0, 0])
    assert len(read(tmp_path, content, keypoints=KeypointOptions()).summary()) == 1


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (
            lambda e: each_place(e, lambda x: x - e["bbox"][0], lambda y: y - e["bbox"][1]),
            "corner of their box",
        ),
        (lambda e: [points_of(e)[i] for i in (1, 0, 2, 4, 3, 5)], "x and y are exchanged"),
        (lambda e: each_place(e, lambda x: x, lambda y: HEIGHT - y), "from the bottom of the image"),
        (lambda e: [0, 0, 2, *points_of(e)[3:]], "a flag of 0 says that one is not there"),
        (lambda e: each_place(e, lambda x: x + 500, lambda y: y), "box (annotations 2, 3, 4"),
    ],
)
def test_keypoints_far_from_their_objects_are_told(tmp_path: Path, change: Any, reason: str) -> None:
    content = with_keypoints(change)
    content["annotations"][0]["keypoints"] = points_of(content["annotations"][0])
    told(tmp_path, content, "with a labelled keypoint far from its box", reason, keypoints=KeypointOptions())
    assert len(read(tmp_path, content).summary()) == 1  # nothing, where keypoints are not learnt


@pytest.mark.parametrize(("factor", "unit"), [(1, "fractions"), (100, "percent")])
def test_keypoints_in_another_unit_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, factor: float, unit: str
) -> None:
    for name, sizes in (("WIDTH", 960), ("HEIGHT", 640), ("BOXES", [[10 * v for v in box] for box in BOXES])):
        monkeypatch.setitem(globals(), name, sizes)

    def change(entry: dict[str, Any]) -> list[float]:
        return each_place(entry, lambda x: factor * x / WIDTH, lambda y: factor * y / HEIGHT)

    words = ("objects have keypoints far from their box", f"keypoints look like {unit} of the image")
    refused(tmp_path, with_keypoints(change), *words, keypoints=KeypointOptions())
    told(tmp_path, with_keypoints(change, 2), "1 object with a labelled", unit, keypoints=KeypointOptions())


@pytest.mark.parametrize("boxes", ["file", "masks"])
def test_an_object_that_is_annotated_twice_is_told(tmp_path: Path, boxes: str) -> None:
    content = tree()
    again = [copy.deepcopy(entry) | {"id": 90 + entry["id"]} for entry in content["annotations"][1:3]]
    content["annotations"] = [*again, *content["annotations"], copy.deepcopy(again[0]) | {"id": 100}]
    words = "3 objects whose image, class, box and mask are those of another (annotations 2, 3, 100)"
    dataset = told(tmp_path, content, words, boxes=boxes)
    assert len(dataset.summary()) == 2


def test_objects_that_only_look_alike_are_no_finding(tmp_path: Path) -> None:
    """One box with two masks, one mask of two classes, one object in two images, and a crowd region."""
    content = tree()
    content["categories"].append({"id": 2, "name": "nucleus"})
    content["images"].append({"id": 1, "file_name": "a.png", "width": WIDTH, "height": HEIGHT})
    first = content["annotations"][0]
    x, y, w, h = first["bbox"]
    others = (
        {"segmentation": [[x, y, x + w, y, x + w, y + h]], "area": w * h / 2},
        {"category_id": 2},
        {"image_id": 1},
        {"iscrowd": 1},
    )
    content["annotations"] += [first | {"id": 50 + i} | other for i, other in enumerate(others)]
    assert "those of another" not in "\n".join(read(tmp_path, content).summary())
