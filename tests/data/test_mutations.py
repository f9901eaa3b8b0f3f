"""Random mistakes in a COCO file: each is read, with what is left out counted, or refused in one line."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from mistakes import mistakes, quiet, write

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.data.masks import rasterise
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.coco import evaluate_coco

KINDS = ("bbox", "segm", "keypoints")


def read(folder: Path, tree: Any, **options: Any) -> CocoDataset | None:
    """The set, or None if it was refused in one line."""
    file = write(folder, tree)
    try:
        return read_coco(file.parent / "images", file, **options)
    except UserError as error:
        message = str(error)
    assert str(file) in message
    assert "\n" not in message
    return None


def perfect(dataset: CocoDataset) -> list[dict[str, Any]]:
    """What a model gives that finds all that is to be found."""
    assert dataset.tree is not None
    return [
        {
            "image_id": entry["image_id"],
            "category_id": entry["category_id"],
            "bbox": entry["bbox"],
            "segmentation": rle(entry, dataset),
            "keypoints": entry.get("keypoints") or [0] * 9,
            "score": 0.9,
        }
        for entry in dataset.tree["annotations"]
        if not entry["iscrowd"]
    ]


def rle(entry: dict[str, Any], dataset: CocoDataset) -> Any:
    record = next(r for r in dataset.records if r.image_id == entry["image_id"])
    x, y, w, h = entry["bbox"]
    shape = entry.get("segmentation") or [[x, y, x + w, y, x + w, y + h, x, y + h]]
    return rasterise(shape, record.height, record.width)


def check(folder: Path, tree: Any) -> None:
    entries = tree.get("annotations")
    count = len(entries) if isinstance(entries, list | dict) else 0
    for options in (
        {"require_masks": True},
        {"require_masks": False, "boxes": "masks"},
        {"require_masks": False, "keypoints": KeypointOptions()},
    ):
        dataset = read(folder, tree, **options)  # type: ignore[arg-type]
        if dataset is not None:
            kept = sum(len(record.objects) for record in dataset.records)
            left = sum(len(f.ids) for f in dataset.findings if f.severity == "left out")
            assert kept + left == count, dataset.summary()
    dataset = read(folder, tree, keep_tree=True, keypoints=KeypointOptions())
    if dataset is not None:
        values = evaluate_coco(dataset, perfect(dataset), KINDS, show=False)
        for kind in ("bbox", "segm"):
            assert values[f"{kind}/AP"] == pytest.approx(100), (kind, dataset.summary())
        assert math.isnan(values["keypoints/AP"]) or values["keypoints/AP"] == pytest.approx(100)


@quiet(max_examples=200)
@given(mistakes())
def test_mistakes_are_refused_or_counted(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    check(tmp_path_factory.getbasetemp(), tree)


@pytest.mark.slow
@quiet(max_examples=5000)
@given(mistakes())
def test_many_mistakes(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    check(tmp_path_factory.getbasetemp(), tree)
