"""Keypoints from the file to the batch: names, mirror pairs, pixel convention, flips, and mistakes."""

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

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.keypoints import COCO_PERSON, KeypointOptions, mirror_of
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.same_classes import check_same_classes
from fastmrcnn.data.transforms import Augment, Plan, apply_plan, transform_keypoints
from fastmrcnn.errors import UserError

NAMES = ["nose", "left_eye", "right_eye"]
DEFAULTS = KeypointOptions()
POINTS = [5, 6, 2, 7, 5, 1, 0, 0, 0]


def tree(points: Any = POINTS, names: Any = NAMES, **entry: Any) -> dict[str, Any]:
    """An image of 20 (high) x 30 with one object, and another one with none."""
    first = {"id": 1, "image_id": 7, "category_id": 2, "bbox": [4, 4, 8, 8], "num_keypoints": 2}
    return {
        "images": [{"id": i, "file_name": "a.png", "width": 30, "height": 20} for i in (7, 8)],
        "annotations": [first | {"keypoints": points} | entry],
        "categories": [{"id": 2, "name": "person", "keypoints": names, "skeleton": [[1, 2], [1, 3]]}],
    }


def read(
    folder: Path, content: Any, options: KeypointOptions | None = DEFAULTS, name: str = "set.json"
) -> CocoDataset:
    Image.new("RGB", (30, 20)).save(folder / "a.png")
    (folder / name).write_text(json.dumps(content))
    return read_coco(folder, folder / name, require_masks=False, keypoints=options)


def test_reads_names_skeleton_pairs_and_places(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree())
    assert dataset.keypoints is not None
    assert dataset.keypoints.names == NAMES
    assert dataset.keypoints.skeleton == [(0, 1), (0, 2)]
    assert dataset.keypoints.mirror == [0, 2, 1]
    [item] = dataset.records[0].objects
    assert item.keypoints is not None
    # COCO numbers pixels; the centre of pixel 5 is at 5.5. What is not labelled is all 0.
    np.testing.assert_array_equal(item.keypoints, [[5.5, 6.5, 2], [7.5, 5.5, 1], [0, 0, 0]])
    assert dataset.summary()[0].startswith(
        "set.json: 2 images, 1 object, 1 class, 3 keypoints, labelled on 1 object; 1 image"
    )
    shifted = read(tmp_path, tree(), KeypointOptions(offset=0.0))
    assert shifted.records[0].objects[0].keypoints[0].tolist() == [5, 6, 2]
    ignored = read(tmp_path, tree(points="nonsense"), None)
    assert (ignored.keypoints, ignored.records[0].objects[0].keypoints) == (None, None)


def test_objects_without_keypoints_and_crowds_are_fine(tmp_path: Path) -> None:
    content = tree()
    first = content["annotations"][0]
    bare = {key: value for key, value in first.items() if "keypoints" not in key}
    content["annotations"] += [
        bare | {"id": 2},
        bare | {"id": 3, "keypoints": [], "num_keypoints": 0},
        bare | {"id": 4, "keypoints": [0] * 9},
        first | {"id": 5, "iscrowd": 1},
    ]
    content["categories"].append({"id": 4, "name": "ball"})  # may have none
    objects = read(tmp_path, content).records[0].objects
    assert [item.keypoints is not None for item in objects] == [True, False, False, False, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": [1, 2, 2]}, ["annotation 1: keypoints is 3 numbers, expected 9"]),
        ({"points": {"a": 1}}, ["annotation 1: keypoints is a dict, expected 9"]),
        ({"points": [*POINTS[:8], float("nan")]}, ["annotation 1", "not finite"]),
        ({"points": [*POINTS[:8], "two"]}, ["annotation 1", "not finite numbers"]),
        ({"points": [*POINTS[:8], 3]}, ["annotation 1", "keypoint 'right_eye' is 3", "0 (not labelled)"]),
        ({"points": [1e7, *POINTS[1:]]}, ["annotation 1", "more than 1,000,000 pixels"]),
        ({"points": []}, ["annotation 1: num_keypoints is 2, but there are no keypoints"]),
        ({"names": ["a", "a", "b"]}, ["category 2: keypoint 'a' is there twice"]),
        ({"names": "nose"}, ["category 2: keypoints is not a list of names"]),
        ({"names": ["nose", "left_eye", "ear"]}, ["category 2: keypoint 'left_eye' has no counterpart"]),
        ({"names": ["nose", "eye"]}, ["category 2: skeleton is not a list of pairs", "1 to 2"]),
        ({"names": []}, ["set.json: no category names its keypoints", "model.keypoint_head.enabled=false"]),
    ],
)
def test_mistakes_name_file_id_and_remedy(tmp_path: Path, changes: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, tree(**changes))
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(str(tmp_path / "set.json"))
    for word in words:
        assert word in message


anything = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 10**30) | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(anything, anything, anything, anything, st.booleans())
def test_whatever_stands_there_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, points: Any, number: Any, names: Any, skeleton: Any, named: bool
) -> None:
    content = tree(points, NAMES if named else names, num_keypoints=number)
    content["categories"][0]["skeleton"] = skeleton
    with contextlib.suppress(UserError):
        read(tmp_path_factory.getbasetemp(), content)


def test_categories_must_agree(tmp_path: Path) -> None:
    content = tree()
    content["categories"].append({"id": 3, "name": "child", "keypoints": NAMES})
    assert read(tmp_path, content).keypoints is not None
    content["categories"][1]["keypoints"] = ["nose", "right_eye", "left_eye"]
    with pytest.raises(UserError, match=r"category 3: its keypoints are not those of category 2; all"):
        read(tmp_path, content)
    train, val = read(tmp_path, tree()), tree(names=["nose", "right_eye", "left_eye"])
    with pytest.raises(UserError, match=r"val\.json: its keypoints do not match .*set\.json: nose, right"):
        check_same_classes(train, read(tmp_path, val, name="val.json"))


@pytest.mark.parametrize(
    ("names", "pairs", "expected"),
    [
        (["L_Eye", "R_Eye", "Nose"], None, [1, 0, 2]),
        (["EyeLeft", "eye_right"], None, [1, 0]),
        (["front left", "front right", "back left", "back right"], None, [1, 0, 3, 2]),
        (["top", "bottom", "r"], None, [0, 1, 2]),
        (["leftover", "copyright"], None, [0, 1]),
        (["a", "b", "c"], [("c", "a")], [2, 1, 0]),
        (["left", "top"], [], [0, 1]),
    ],
)
def test_mirror_pairs(names: list[str], pairs: Any, expected: list[int]) -> None:
    assert mirror_of(names, pairs) == expected


def test_wrong_pairs_are_refused(tmp_path: Path) -> None:
    for pairs, words in (
        ([("nose", "mouth")], "no keypoint 'mouth', which data.keypoint_flip_pairs"),
        ([("nose", "left_eye"), ("left_eye", "right_eye")], "keypoint 'left_eye' is twice"),
    ):
        with pytest.raises(UserError, match=words):
            read(tmp_path, tree(), KeypointOptions(pairs))


def test_coco_person() -> None:
    names, skeleton, mirror = COCO_PERSON
    assert len(names) == 17
    assert len(skeleton) == 19
    assert mirror == [0, 2, 1, 4, 3, 6, 5, 8, 7, 10, 9, 12, 11, 14, 13, 16, 15]
    joined = [tuple(sorted((names[a], names[b]))) for a, b in skeleton]
    assert ("left_ankle", "left_knee") in joined
    # The lines are their own mirror image.
    assert {tuple(sorted((names[mirror[a]], names[mirror[b]]))) for a, b in skeleton} == set(joined)


def test_images_with_too_few_labels_are_left_out(tmp_path: Path) -> None:
    for least, images in ((0, [7, 8]), (1, [7]), (2, [7])):
        dataset = read(tmp_path, tree(), KeypointOptions(least=least))
        assert [record.image_id for record in dataset.records] == images
    assert "left out 1 image with too few labelled keypoints" in dataset.summary()[0]
    with pytest.raises(UserError, match=r"left out 2 images with too few labelled keypoints"):
        read(tmp_path, tree(), KeypointOptions(least=3))
    with pytest.raises(UserError, match=r"set\.json: no keypoint is labelled"):
        read(tmp_path, tree([0] * 9, num_keypoints=0))


plans = st.fixed_dictionaries(
    {"turns": st.integers(0, 3), "flip_horizontal": st.booleans(), "flip_vertical": st.booleans()}
)


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 20), st.integers(2, 20), plans, st.data())
def test_keypoints_move_with_their_pixels(
    height: int, width: int, changes: dict[str, Any], data: st.DataObject
) -> None:
    """The pixel that was marked is the pixel at the moved keypoint; left and right swap in a mirror."""
    plan = Plan((height, width), **changes)
    cells = data.draw(st.lists(st.integers(0, height * width - 1), min_size=3, max_size=3, unique=True))
    pixels = np.zeros((height, width, 3), np.uint8)
    points = np.zeros((1, 3, 3), np.float32)
    for index, cell in enumerate(cells):
        y, x = divmod(cell, width)
        pixels[y, x] = index + 1
        points[0, index] = (x + 0.5, y + 0.5, 1 + index % 2)
    moved = transform_keypoints(points, plan, height, width, [0, 2, 1])
    seen = apply_plan(pixels, plan)
    swap = changes["flip_horizontal"] != changes["flip_vertical"]
    for index, (x, y, visibility) in enumerate(moved[0].tolist()):
        before = [0, 2, 1][index] if swap else index
        assert seen[int(y), int(x), 0] == before + 1
        assert (x % 1, y % 1) == (0.5, 0.5)
        assert visibility == 1 + before % 2


def test_scale_and_points_outside() -> None:
    points = np.array([[[10, 5, 2], [40, 5, 1], [-1, 3, 2], [3, 3, 0]]], np.float32)
    moved = transform_keypoints(points, Plan((40, 60), flip_horizontal=True), 20, 30, [1, 0, 2, 3])
    # 40 and -1 lie outside of the 30 columns; a label of 0 stays 0.
    np.testing.assert_array_equal(moved, [[[0, 0, 0], [40, 10, 2], [0, 0, 0], [0, 0, 0]]])


def test_batches_hold_keypoints(tmp_path: Path) -> None:
    dataset = read(tmp_path, tree())
    for probability, expected in (
        (0.0, [[11, 13, 2], [15, 11, 1], [0, 0, 0]]),
        (1.0, [[49, 13, 2], [0, 0, 0], [45, 11, 1]]),
    ):
        loader = TrainLoader(
            dataset,
            batch=2,
            short_sides=[40],
            long_side_max=60,
            steps=1,
            augment=Augment(flip_horizontal=probability),
        )
        [loaded] = loader
        targets = loaded.batch.targets
        assert targets is not None
        assert targets.keypoints is not None
        assert targets.keypoints.shape == (2, 8, 3, 3)
        row = loaded.image_ids.index(7)
        np.testing.assert_allclose(targets.keypoints[row, 0], expected, atol=1e-5)
        assert targets.keypoints[1 - row].abs().sum() == 0
        assert targets.keypoints[row, 1:].abs().sum() == 0
    plain = read(tmp_path, tree(), None)
    [loaded] = TrainLoader(plain, batch=2, short_sides=[40], long_side_max=60, steps=1)
    assert loaded.batch.targets is not None
    assert loaded.batch.targets.keypoints is None
