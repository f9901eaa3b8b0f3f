"""The sets that the paper's claims are tried on: what is annotated is what can be seen."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as coco_mask

from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.study.scenes import KEYPOINT_NAMES, SETS, write_scenes


def written(folder: Path, name: str, seed: int = 0, train: int = 12) -> dict[str, Path]:
    return write_scenes(folder / f"{name}{seed}{train}", name, seed=seed, train=train, val=2, size=96)


@pytest.mark.parametrize("name", list(SETS))
def test_a_seed_gives_the_same_files_and_more_images_leave_the_first_ones(tmp_path: Path, name: str) -> None:
    one, other = written(tmp_path / "a", name), written(tmp_path / "b", name, train=14)
    for image in sorted(one["train_images"].iterdir()):
        assert image.read_bytes() == (other["train_images"] / image.name).read_bytes()
    assert one["val_annotations"].read_text() == other["val_annotations"].read_text()
    assert one["train_annotations"].read_text() != written(tmp_path, name, 1)["train_annotations"].read_text()


@pytest.mark.parametrize("name", list(SETS))
def test_the_reader_takes_every_object(tmp_path: Path, name: str) -> None:
    paths = written(tmp_path, name)
    keypoints = KeypointOptions() if name == "figures" else None
    dataset = read_coco(
        paths["train_images"], paths["train_annotations"], max_objects=64, min_box_side=1, keypoints=keypoints
    )
    tree = json.loads(paths["train_annotations"].read_text())
    assert sum(len(record.objects) for record in dataset.records) == len(tree["annotations"])
    assert [line for line in dataset.summary() if "skipped" in line] == []


@pytest.mark.parametrize("name", list(SETS))
def test_masks_of_an_image_do_not_overlap(tmp_path: Path, name: str) -> None:
    """What is hidden is not annotated."""
    tree = json.loads(written(tmp_path, name)["train_annotations"].read_text())
    for image in tree["images"]:
        masks = [
            coco_mask.decode(coco_mask.frPyObjects(entry["segmentation"], 96, 96))
            for entry in tree["annotations"]
            if entry["image_id"] == image["id"]
        ]
        assert np.sum(masks, axis=0).max() == 1
        assert min(mask.sum() for mask in masks) >= 4


def test_lookalikes_hide_one_another(tmp_path: Path) -> None:
    """Else the comparison of sigmoid and softmax would have nothing to tell apart."""
    tree = json.loads(written(tmp_path, "objects", train=40)["train_annotations"].read_text())
    met = 0
    for image in tree["images"]:
        entries = [entry for entry in tree["annotations"] if entry["image_id"] == image["id"]]
        for one in entries:
            for other in entries:
                pair = other["category_id"] - 1 == (one["category_id"] - 1) ^ 1
                (x, y, w, h), (u, v, s, t) = one["bbox"], other["bbox"]
                met += pair and x < u + s and u < x + w and y < v + t and v < y + h
    assert met >= 20


def test_visible_keypoints_lie_on_their_figure(tmp_path: Path) -> None:
    tree = json.loads(written(tmp_path, "figures", train=20)["train_annotations"].read_text())
    on, flags = [], []
    for entry in tree["annotations"]:
        mask = coco_mask.decode(coco_mask.frPyObjects(entry["segmentation"], 96, 96))
        points = np.array(entry["keypoints"]).reshape(-1, 3)
        assert len(points) == len(KEYPOINT_NAMES)
        assert entry["num_keypoints"] == (points[:, 2] > 0).sum()
        flags += points[:, 2].tolist()
        for x, y, flag in points:
            if flag == 2:  # the last pixel of a thin hand may miss the point by one
                row, column = round(y), round(x)
                on.append(mask[max(0, row - 1) : row + 2, max(0, column - 1) : column + 2].any())
    assert np.mean(on) > 0.99
    assert {0, 1, 2} == set(flags)
