"""The embedded set is true to its annotations, varied, and the same for the same seed."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from fastmrcnn.data.coco import read_coco
from fastmrcnn.data.images import read_image
from fastmrcnn.data.masks import bitmap
from fastmrcnn.data.shapes import CLASS_NAMES, draw_image, write_shapes


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return write_shapes(tmp_path_factory.mktemp("shapes"), seed=0, train=100, val=20)


def test_what_is_in_it(paths: dict[str, Path]) -> None:
    dataset = read_coco(paths["train_images"], paths["train_annotations"], max_objects=5)
    assert dataset.class_names == list(CLASS_NAMES)
    assert not dataset.skipped
    assert not dataset.clipped
    objects = [item for record in dataset.records for item in record.objects]
    assert set(Counter(item.class_index for item in objects)) == set(range(5))
    assert 1 <= sum(not record.objects for record in dataset.records) <= 12
    kinds = Counter(
        "polygon" if isinstance(item.segmentation, list) else type(item.segmentation["counts"]).__name__
        for item in objects
    )
    assert kinds["polygon"] > 100
    assert kinds["str"] > 30
    assert kinds["list"] > 30
    sides = [max(item.box[2] - item.box[0], item.box[3] - item.box[1]) for item in objects]
    assert min(sides) >= 10
    assert max(sides) <= 66
    assert len(read_coco(paths["val_images"], paths["val_annotations"])) == 20


def test_annotations_are_what_can_be_seen(paths: dict[str, Path]) -> None:
    dataset = read_coco(paths["train_images"], paths["train_annotations"])
    holes = overlapping = 0
    for record in dataset.records:
        taken = np.zeros((record.height, record.width), np.int64)
        boxes = np.zeros_like(taken)
        for item in record.objects:
            crop, (x, y, w, h) = bitmap(item.segmentation, record.height, record.width)
            assert item.box == (x, y, x + w, y + h)
            assert item.area == crop.sum() > 0
            taken[y : y + h, x : x + w] += crop
            boxes[y : y + h, x : x + w] += 1
            holes += item.class_index == CLASS_NAMES.index("ring") and not crop[h // 2, w // 2]
        assert taken.max(initial=0) <= 1  # a pixel belongs to one object
        overlapping += boxes.max(initial=0) > 1
    assert holes > 20
    assert overlapping > 20


def test_objects_differ_from_their_background(paths: dict[str, Path]) -> None:
    dataset = read_coco(paths["val_images"], paths["val_annotations"])
    for record in dataset.records:
        pixels = read_image(record)[0].astype(float)
        bitmaps = []
        for item in record.objects:
            crop, (x, y, w, h) = bitmap(item.segmentation, record.height, record.width)
            whole = np.zeros((record.height, record.width), bool)
            whole[y : y + h, x : x + w] = crop
            bitmaps.append(whole)
        for whole in bitmaps:
            ground = pixels[~np.any(bitmaps, axis=0)].mean(axis=0)
            assert np.linalg.norm(pixels[whole].mean(axis=0) - ground) > 30


def test_the_same_seed_writes_the_same_files(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        write_shapes(tmp_path / name, seed=seed, train=3, val=2, size=64)
    files = {name: [p.read_bytes() for p in sorted((tmp_path / name).rglob("*.*"))] for name in "abc"}
    assert len(files["a"]) == 7
    assert files["a"] == files["b"]
    assert all(one != other for one, other in zip(files["a"], files["c"], strict=True))
    train, val = (json.loads((tmp_path / "a" / f"{split}.json").read_text()) for split in ("train", "val"))
    assert train["annotations"][0] != val["annotations"][0]


def test_more_images_leave_the_first_as_they_are(tmp_path: Path) -> None:
    write_shapes(tmp_path / "few", train=2, val=1, size=64)
    write_shapes(tmp_path / "many", train=4, val=1, size=64)
    for name in ("00001.png", "00002.png"):
        few, many = (tmp_path / folder / "train" / name for folder in ("few", "many"))
        assert few.read_bytes() == many.read_bytes()


@pytest.mark.parametrize("size", [32, 100, 512])
def test_any_size(size: int) -> None:
    pixels, _ = draw_image(np.random.default_rng(0), size)
    assert pixels.shape == (size, size, 3)
    assert pixels.dtype == np.uint8
