"""Reading COCO files: what is accepted and counted, and one clear line for every mistake."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from real_data import real_data

from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.masks import bitmap, segmentation_problem
from fastmrcnn.errors import UserError

SQUARE = [[4, 4, 12, 4, 12, 12, 4, 12]]


def tree() -> dict[str, Any]:
    """Two images of 20 (high) x 30, an object in the first."""
    return {
        "images": [
            {"id": 7, "file_name": "a.png", "width": 30, "height": 20},
            {"id": 9, "file_name": "b.png", "width": 30, "height": 20},
        ],
        "annotations": [annotation(1)],
        "categories": [{"id": 3, "name": "cat"}, {"id": 90, "name": "dog"}],
    }


def annotation(identifier: int, **changes: Any) -> dict[str, Any]:
    entry = {
        "id": identifier,
        "image_id": 7,
        "category_id": 90,
        "bbox": [4, 4, 8, 8],
        "area": 64,
        "iscrowd": 0,
        "segmentation": SQUARE,
    }
    return entry | changes


def read(folder: Path, content: Any, **options: Any) -> Any:
    images = folder / "images"
    images.mkdir(exist_ok=True)
    for name in ("a.png", "b.png"):
        Image.new("RGB", (30, 20), (0, 0, ord(name[0]))).save(images / name)
    file = folder / "set.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return read_coco(images, file, **options)


def refuse(folder: Path, content: Any, *words: str, **options: Any) -> str:
    """The one line with which the data is refused."""
    with pytest.raises(UserError) as caught:
        read(folder, content, **options)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message
    return message


def test_reads_what_the_file_says(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree())
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.category_ids == [3, 90]  # with gaps
    first, second = dataset.records
    assert (first.image_id, first.width, first.height, first.path.name) == (7, 30, 20, "a.png")
    [item] = first.objects
    assert (item.annotation_id, item.class_index, item.box, item.crowd, item.area) == (
        1, 1, (4, 4, 12, 12), False, 64,
    )  # fmt: skip
    assert second.objects == []
    assert dataset.summary() == [
        "set.json: 2 images, 1 object, 2 classes; 1 image without objects is used as a negative",
        "set.json: 1 class without any object (cat); it is not learnt, and has no AP",
    ]


def test_corners_in_place_of_width_and_height_are_suspected(tmp_path: Path) -> None:
    content = tree()
    boxes = [[4 + i % 3, 4 + i % 4, 22, 18] for i in range(12)]  # x1, y1, x2, y2
    content["annotations"] = [annotation(i + 1, bbox=box, segmentation=[]) for i, box in enumerate(boxes)]
    assert "is bbox [x1, y1, x2, y2] there?" in read(tmp_path, content, require_masks=False).summary()[0]
    content["annotations"] = [annotation(i + 1) for i in range(12)]
    assert "is bbox" not in read(tmp_path, content).summary()[0]


def test_images_in_floating_point_are_refused_before_training(tmp_path: Path) -> None:
    content = tree()
    content["images"][0]["file_name"] = "float.tiff"
    (tmp_path / "images").mkdir()
    Image.new("F", (30, 20)).save(tmp_path / "images" / "float.tiff")
    refuse(tmp_path, content, "image 7", "float.tiff", "floating-point", "8 or 16 bits")


def test_summary_counts_what_was_left_out(tmp_path: Path) -> None:
    content = tree()
    content["annotations"] += [
        annotation(2, bbox=[4, 4, 0, 8]),
        annotation(3, bbox=[4, 4, 8, -1]),
        annotation(4, bbox=[40, 4, 8, 8]),
        annotation(5, bbox=[-2, 4, 8, 8]),
        annotation(6, bbox=[25, 15, 8, 8]),
        annotation(7, bbox=[4, 4, 8, 0.5]),
        annotation(8, bbox=[4, 4, 8, 1.5], segmentation=[[4, 4, 12, 4, 12, 4.01]], area=1),
        annotation(9, iscrowd=1),
    ]
    dataset = read(tmp_path, content)
    boxes = [item.box for item in dataset.records[0].objects]
    assert boxes == [(4, 4, 12, 12), (0, 4, 6, 12), (25, 15, 30, 20), (4, 4, 12, 12)]
    assert [item.crowd for item in dataset.records[0].objects] == [False, False, False, True]
    assert dataset.summary()[0] == (
        "set.json: 2 images, 3 objects, 2 classes, 1 crowd region; skipped 2 boxes without area, skipped 1 "
        "box outside the image, skipped 1 box with a side under 1 px, skipped 1 box whose mask covers no "
        "pixel, clipped 2 boxes to the image; 1 image without objects is used as a negative"
    )
    assert dataset.summary()[1:] == [
        "set.json: left out 1 object whose mask covers no pixel (annotation 8); correct its segmentation",
        "set.json: skipped 2 boxes without area (annotations 2, 3); correct or remove them",
        "set.json: skipped 1 box outside the image (annotation 4); correct or remove it",
        "set.json: skipped 1 box with a side under 1 px (annotation 7); correct or remove it",
        "set.json: 2 objects whose bbox is not the box of its mask (annotations 5, 6); correct them, or take "
        "boxes from the masks (data.boxes=masks)",
        "set.json: 1 class without any object (cat); it is not learnt, and has no AP",
    ]


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere: no such folder; set data\.val\.images"):
        read_coco(tmp_path / "nowhere", tmp_path / "x.json", key="data.val")
    with pytest.raises(UserError, match=r"x\.json: no such file; set data\.train\.annotations"):
        read_coco(tmp_path, tmp_path / "x.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "not a JSON file: it is empty"),
        ("{'images': 1}", "not valid JSON"),
        ("[1, 2]", "not COCO format: it holds a list"),
        ("{}", "no list of images and no list of annotations and no list of categories"),
        ('{"images": {}, "annotations": [], "categories": []}', "no list of images"),
        (
            '{"images": [], "annotations": [], "categories": [{"id": 1, "name": "a"}]}',
            "list of images is empty",
        ),
    ],
)
def test_json_that_is_not_coco(tmp_path: Path, text: str, words: str) -> None:
    refuse(tmp_path, text, "set.json", words, "data.train.annotations")


def test_no_categories(tmp_path: Path) -> None:
    refuse(tmp_path, tree() | {"categories": []}, "set.json", "list of categories is empty")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"image_id": 8}, "image_id 8 is not among the images"),
        ({"category_id": 4}, "category_id 4 is not among the categories"),
        ({"category_id": [4]}, "category_id [4] is not among the categories"),
        ({"bbox": [1, 2, 3]}, "bbox [1, 2, 3] is not four finite numbers"),
        ({"bbox": [1, 2, 3, float("nan")]}, "is not four finite numbers"),
        ({"bbox": None}, "bbox None is not four finite numbers"),
        ({"iscrowd": 2}, "iscrowd is 2, not 0 or 1"),
        ({"segmentation": []}, "no segmentation"),
        ({"segmentation": [[1, 1, 5, 5]]}, "polygon has 2 points, fewer than 3"),
        ({"segmentation": [*SQUARE, [1, 1]]}, "polygon has 1 points, fewer than 3"),
        ({"segmentation": [[1, 1, 5, 5, 1, 5, 2]]}, "polygon has 7 coordinates, an odd number"),
        ({"segmentation": [[1, 1, 5, 5, 1, "x"]]}, "not finite numbers"),
        ({"segmentation": [[1, 1, 5, 5, 1, float("inf")]]}, "not finite numbers"),
        ({"segmentation": [1, 1, 5, 5, 1, 5]}, "must be a list of polygons"),
        ({"segmentation": "x"}, "neither a list of polygons nor an RLE"),
        ({"segmentation": {"size": [30, 20], "counts": [600]}}, "RLE has size [30, 20], its image"),
        ({"segmentation": {"size": [20, 30], "counts": [10, 10]}}, "add up to 20 pixels, not 20 x 30"),
        ({"segmentation": {"size": [20, 30], "counts": [-1, 601]}}, "not whole numbers from 0"),
        ({"segmentation": {"size": [20, 30], "counts": "44"}}, "add up to 8 pixels"),
        ({"segmentation": {"size": [20, 30], "counts": "zz~"}}, "not a COCO string"),
        ({"segmentation": {"size": [20, 30]}}, "neither a list nor a string of counts"),
    ],
)  # fmt: skip
def test_bad_annotation(tmp_path: Path, changes: dict[str, Any], words: str) -> None:
    content = tree()
    content["annotations"].append(annotation(55, **changes))
    refuse(tmp_path, content, "set.json", "annotation 55", words, "correct or remove")


@pytest.mark.parametrize(
    ("part", "entry", "words"),
    [
        ("annotations", annotation(1), "annotation 1: its id is there twice"),
        ("annotations", {}, "annotation number 2: image_id None is not among the images"),
        ("annotations", 5, "annotation number 2: is a int, not an object"),
        ("images", {"id": 7, "file_name": "c", "width": 2, "height": 2}, "image 7: its id is there twice"),
        (
            "images",
            {"id": "eight", "file_name": "c", "width": 2, "height": 2},
            "its id 'eight' is not a whole number",
        ),
        ("images", {"id": 8, "width": 2, "height": 2}, "image 8: no file_name"),
        ("images", {"id": 8, "file_name": "c", "width": 0, "height": 2}, "image 8: width 0, height 2"),
        ("images", {"id": 8, "file_name": "c", "height": 2}, "image 8: width None, height 2"),
        ("categories", {"id": 3, "name": "cow"}, "category 3: its id is there twice"),
        ("categories", {"id": 5}, "category 5: no name"),
    ],
)
def test_bad_entry(tmp_path: Path, part: str, entry: Any, words: str) -> None:
    content = tree()
    content[part].append(entry)
    refuse(tmp_path, content, "set.json", words)


def test_all_mistakes_at_once_and_like_ones_together(tmp_path: Path) -> None:
    content = tree()
    content["annotations"] += [annotation(i, image_id=100 + i) for i in range(10, 17)]
    content["annotations"].append(annotation(20, category_id=1))
    message = refuse(tmp_path, content)
    assert "annotation 10: image_id 110 is not among the images (the same: 11, 12, 13 and 3 more)" in message
    assert "annotation 20: category_id 1" in message


def test_missing_images(tmp_path: Path) -> None:
    content = tree()
    content["images"] += [
        {"id": i, "file_name": f"sub/{i}.png", "width": 2, "height": 2} for i in range(20, 25)
    ]
    refuse(tmp_path, content, "5 of 7 images not found", "sub/20.png, sub/21.png, sub/22.png and 2 more",
           "data.train.images")  # fmt: skip


def test_size_and_damage_are_seen_before_training(tmp_path: Path) -> None:
    content = tree()
    content["images"][1] |= {"width": 20, "height": 30}
    refuse(tmp_path, content, "image 9", "b.png has width 30, height 20", "width 20, height 30", "correct")
    (tmp_path / "images" / "c.png").write_bytes(b"")
    content = tree()
    content["images"].append({"id": 10, "file_name": "c.png", "width": 30, "height": 20})
    refuse(tmp_path, content, "image 10", "c.png is not an image file that can be read")


def test_too_many_objects(tmp_path: Path) -> None:
    content = tree()
    content["annotations"] = [annotation(i) for i in range(1, 6)]
    refuse(tmp_path, content, "image 7", "a.png has 5 objects, more than data.max_objects = 4",
           "data.max_objects=5", max_objects=4)  # fmt: skip
    assert len(read(tmp_path, content, max_objects=5).records[0].objects) == 5


def test_a_set_without_objects(tmp_path: Path) -> None:
    content = tree() | {"annotations": []}
    refuse(tmp_path, content, "set.json", "no image has an object to learn")
    assert len(read(tmp_path, content, require_objects=False)) == 2
    content["annotations"] = [annotation(1, bbox=[0, 0, 0, 0])]
    refuse(tmp_path, content, "no image has an object to learn", "skipped 1 box without area")


def test_boxes_alone_are_enough_without_masks(tmp_path: Path) -> None:
    content = tree()
    del content["annotations"][0]["segmentation"], content["annotations"][0]["area"]
    refuse(tmp_path, content, "annotation 1: no segmentation", "model.mask_head.enabled=false")
    [item] = read(tmp_path, content, require_masks=False).records[0].objects
    assert item.segmentation is None
    assert item.area == 64


def test_area_is_counted_where_the_file_has_none(tmp_path: Path) -> None:
    content = tree()
    del content["annotations"][0]["area"]
    content["annotations"][0]["segmentation"] = [[4, 4, 12, 4, 12, 8, 4, 8]]
    assert read(tmp_path, content).records[0].objects[0].area == 32


def test_holes_parts_and_rle_become_the_same_bitmap() -> None:
    ring = np.zeros((20, 30), np.uint8)
    ring[4:12, 6:16] = 1
    ring[6:9, 8:11] = 0
    compressed = coco_mask.encode(np.asfortranarray(ring))
    text = {"size": [20, 30], "counts": compressed["counts"].decode()}
    flat = np.concatenate(([0], ring.ravel(order="F"), [0])).astype(np.int8)
    edges = np.flatnonzero(np.diff(flat))
    runs = {"size": [20, 30], "counts": np.diff([0, *edges, 600]).tolist()}
    for rle in (text, runs):
        assert segmentation_problem(rle, 20, 30) is None
        crop, window = bitmap(rle, 20, 30)
        assert window == (6, 4, 10, 8)
        np.testing.assert_array_equal(crop, ring[4:12, 6:16])
    parts = [[2, 2, 5, 2, 5, 5, 2, 5], [20, 10, 40, 10, 40, 30, 20, 30]]  # the second leaves the image
    crop, window = bitmap(parts, 20, 30)
    assert window == (2, 2, 28, 18)
    assert crop.sum() == 9 + 100
    assert bitmap([[50, 50, 60, 50, 60, 60]], 20, 30)[1] == (0, 0, 0, 0)


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.floats(0, 1), st.integers(0, 10_000))
def test_compressed_rle_is_read_as_pycocotools_writes_it(h: int, w: int, share: float, seed: int) -> None:
    mask = (np.random.default_rng(seed).random((h, w)) < share).astype(np.uint8)
    counts = coco_mask.encode(np.asfortranarray(mask))["counts"].decode()
    rle = {"size": [h, w], "counts": counts}
    assert segmentation_problem(rle, h, w) is None
    crop, (x, y, width, height) = bitmap(rle, h, w)
    pasted = np.zeros_like(mask)
    pasted[y : y + height, x : x + width] = crop
    np.testing.assert_array_equal(pasted, mask)
    assert crop.size == 0 or (crop.any(axis=0)[[0, -1]].all() and crop.any(axis=1)[[0, -1]].all())


def test_nuclei() -> None:
    nuclei = real_data("nuclei")
    dataset = read_coco(nuclei / "images", nuclei / "train.json")
    assert dataset.summary() == ["train.json: 35 images, 349 objects, 1 class"]
    coco = COCO(nuclei / "train.json")
    count = 0
    for record in dataset.records:
        for item in record.objects:
            whole = coco.annToMask(coco.anns[item.annotation_id])
            crop, (x, y, w, h) = bitmap(item.segmentation, record.height, record.width)
            np.testing.assert_array_equal(crop, whole[y : y + h, x : x + w])
            assert crop.sum() == whole.sum() == coco_mask.area(coco.annToRLE(coco.anns[item.annotation_id]))
            count += 1
    assert count == 349


JUNK = [
    None,
    True,
    -1,
    0,
    1.5,
    10**30,
    float("nan"),
    float("inf"),
    "",
    "x",
    [],
    [[]],
    [None],
    {},
    {"size": 1},
]


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every key and index within a tree."""
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


def test_junk_anywhere_is_accepted_or_a_user_error(tmp_path: Path) -> None:
    rle = annotation(2, segmentation={"size": [20, 30], "counts": [10, 10, 580]})
    counts = coco_mask.encode(np.ones((20, 30), np.uint8, order="F"))["counts"].decode()
    text = annotation(
        3, bbox=[0, 0, 30, 20], segmentation={"size": [20, 30], "counts": counts}, category_id=3
    )
    content = tree()
    content["annotations"] += [rle, text]
    assert len(read(tmp_path, content).records[0].objects) == 3
    source = json.dumps(content)
    tried = accepted = 0
    for place in places(content):
        for junk in [*JUNK, "gone"]:
            changed = json.loads(source)
            node = changed
            for key in place[:-1]:
                node = node[key]
            if junk == "gone":
                del node[place[-1]]
            else:
                node[place[-1]] = junk
            images, file = tmp_path / "images", tmp_path / "set.json"
            file.write_text(json.dumps(changed))
            with contextlib.suppress(UserError):
                dataset = read_coco(images, file)
                for record in dataset.records:
                    for item in record.objects:
                        bitmap(item.segmentation, record.height, record.width)
                accepted += 1
            tried += 1
    assert 100 < accepted < tried / 2
