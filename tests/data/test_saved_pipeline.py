"""Saved pipelines of Albumentations: objects go along, and each sample is a function of seed and index."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coloured import FILL, check_agreement, coloured, extent

from fastmrcnn.config.file import parse_config
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import read_objects
from fastmrcnn.data.loader import TrainLoader
from fastmrcnn.data.object_tables import split_crops
from fastmrcnn.data.saved_pipeline import Pipeline
from fastmrcnn.data.transforms import Augment
from fastmrcnn.errors import UserError


def saved(folder: Path, name: str, *steps: Any) -> str:
    albumentations = pytest.importorskip("albumentations")
    path = folder / name
    kind = "yaml" if path.suffix == ".yaml" else "json"
    albumentations.save(albumentations.Compose(list(steps)), path, data_format=kind)
    return str(path)


def moving(folder: Path, name: str = "moving.json") -> str:
    import albumentations as A

    affine = A.Affine(rotate=(-25, 25), scale=(0.8, 1.2), p=1, interpolation=1, fill=FILL)
    return saved(folder, name, A.HorizontalFlip(p=0.5), affine, A.RandomSizedCrop((40, 55), (50, 70), p=0.5))


def loader(dataset: CocoDataset, pipeline: str, **options: Any) -> TrainLoader:
    augment = Augment(0.5, albumentations=pipeline, fill=FILL, **options.pop("augment", {}))
    defaults: dict[str, Any] = {"batch": 2, "short_sides": [60, 90], "long_side_max": 120, "steps": 8}
    return TrainLoader(dataset, augment=augment, seed=3, **(defaults | options))


@pytest.mark.parametrize(
    "augment", [{}, {"crop": (96, 96), "scale": (0.5, 1.5)}], ids=["alone", "with jitter"]
)
def test_masks_and_boxes_lie_on_the_pixels(tmp_path: Path, augment: dict[str, Any]) -> None:
    pytest.importorskip("albumentations")
    dataset = coloured(tmp_path)
    found = [
        check_agreement(loaded.batch, row)
        for loaded in loader(dataset, moving(tmp_path), augment=augment)
        for row in range(2)
    ]
    assert sum(found) > 20


def test_samples_depend_on_seed_and_index_alone(tmp_path: Path) -> None:
    pytest.importorskip("albumentations")
    dataset, pipeline = coloured(tmp_path), moving(tmp_path, "moving.yaml")

    def pixels(**options: Any) -> list[torch.Tensor]:
        found = loader(dataset, pipeline, buckets=[(128, 128)], **options)
        return [image for loaded in found for image in loaded.batch.pixels]

    one = pixels(batch=1, steps=8)
    assert all(torch.equal(*pair) for pair in zip(one, pixels(batch=2, steps=4, workers=2), strict=True))
    assert all(
        torch.equal(*pair) for pair in zip(one[4:], pixels(batch=1, steps=8, start_step=4), strict=True)
    )
    assert not torch.equal(one[0], one[4])


def test_what_does_not_move_stays_as_it_is_annotated(tmp_path: Path) -> None:
    A = pytest.importorskip("albumentations")
    record = coloured(tmp_path).records[0]
    objects = read_objects(record, polygons=True)
    pixels = np.full((60, 80, 3), 90, np.uint8)
    pipeline = Pipeline(saved(tmp_path, "light.json", A.RandomBrightnessContrast((0.3, 0.3), p=1)))
    image, same = pipeline(pixels, objects, None, 5)
    assert image.mean() > 100
    for name, value in objects._asdict().items():
        if isinstance(value, np.ndarray):
            np.testing.assert_array_equal(getattr(same, name), value)
    assert same.polygons is not None
    assert objects.polygons is not None
    np.testing.assert_array_equal(same.polygons.vertices, objects.polygons.vertices)


def test_keypoints_swap_in_a_mirror_image_and_bitmaps_are_mirrored(tmp_path: Path) -> None:
    A = pytest.importorskip("albumentations")
    dataset = coloured(tmp_path, keypoints=True)
    record, schema = dataset.records[0], dataset.keypoints
    objects = read_objects(record, schema, polygons=True)
    pipeline = Pipeline(saved(tmp_path, "flip.json", A.HorizontalFlip(p=1)))
    _, moved = pipeline(np.zeros((60, 80, 3), np.uint8), objects, schema, 0)
    assert objects.keypoints is not None
    assert moved.keypoints is not None
    left, right = objects.keypoints[0]
    np.testing.assert_allclose(
        moved.keypoints[0], [[80 - right[0], *right[1:]], [80 - left[0], *left[1:]]], atol=1e-4
    )
    assert moved.polygons is not None
    assert not moved.polygons.parts.any()
    for crop, mirrored, window, other in zip(
        split_crops(objects), split_crops(moved), objects.windows, moved.windows, strict=True
    ):
        np.testing.assert_array_equal(mirrored, crop[:, ::-1])
        assert other.tolist() == [80 - window[0] - window[2], *window[1:].tolist()]


def test_objects_that_leave_are_gone(tmp_path: Path) -> None:
    A = pytest.importorskip("albumentations")
    record = coloured(tmp_path).records[0]
    pipeline = Pipeline(saved(tmp_path, "crop.json", A.Crop(0, 0, 25, 60)))
    image, left = pipeline(np.zeros((60, 80, 3), np.uint8), read_objects(record), None, 0)
    assert image.shape == (60, 25, 3)
    assert left.classes.tolist() == [0]
    boxes = Pipeline(saved(tmp_path, "again.json", A.Crop(0, 0, 40, 60)))
    image, left = boxes(np.zeros((60, 80, 3), np.uint8), read_objects(record, masks=False), None, 0)
    assert left.classes.tolist() == [0, 1]
    assert left.boxes[1, 2] == 40
    assert extent(np.ones((2, 3), bool)).tolist() == [0, 0, 3, 2]


def test_what_cannot_be_used_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    A = pytest.importorskip("albumentations")
    dataset = coloured(tmp_path)
    with pytest.raises(UserError, match=r"data\.augment\.albumentations=/nowhere\.json: FileNotFoundError"):
        loader(dataset, "/nowhere.json")
    bad = tmp_path / "bad.json"
    bad.write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json: .*expected what albumentations\.save writes"):
        loader(dataset, str(bad))
    normal = saved(tmp_path, "normal.json", A.Normalize())
    for workers in (0, 1):
        with pytest.raises(UserError, match=r"gives float32 \(60, 80, 3\), not uint8 .* without Normalize"):
            next(iter(loader(dataset, normal, workers=workers, max_broken=1)))
    large = saved(tmp_path, "large.json", A.RandomCrop(500, 500))
    with pytest.raises(UserError, match=r"large\.json: CropSizeError"):
        next(iter(loader(dataset, large, max_broken=1)))


def test_without_the_package_one_line_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "albumentations", None)
    with pytest.raises(UserError, match=r"pip install 'fastmrcnn\[albumentations\]'"):
        Pipeline("p.json")


def test_it_does_not_go_with_several_images() -> None:
    with pytest.raises(UserError, match="does not go with mosaic and copy_paste"):
        parse_config({"data": {"augment": {"albumentations": "p.json", "copy_paste": 0.5}}}, "x.yaml")
