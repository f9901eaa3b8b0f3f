"""Random changes of images: masks, boxes and keypoints lie where the pixels are, and each sample is a function
of seed and index."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from coloured import BACKGROUND, FILL, check_agreement, coloured, extent, object_map

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.collate import make_sample, read_objects
from fastmrcnn.data.loader import LoadedBatch, TrainLoader
from fastmrcnn.data.transforms import Augment, Plan, apply_plan, draws, image_to_input, plan_image, resize
from fastmrcnn.structures import tree_map

FLIPS = Augment(0.5, 0.5, 0.5, fill=FILL)
KINDS = {
    "crop": dataclasses.replace(FLIPS, crop=(64, 96)),
    "jitter": dataclasses.replace(FLIPS, crop=(96, 64), scale=(0.3, 2.0)),
    "rotate": dataclasses.replace(FLIPS, rotate=30),
    "everything": dataclasses.replace(FLIPS, crop=(96, 96), scale=(0.5, 2.0), rotate=20),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> CocoDataset:
    return coloured(tmp_path_factory.mktemp("coloured"))


def loader(dataset: CocoDataset, augment: Augment, **options: Any) -> TrainLoader:
    defaults: dict[str, Any] = {"batch": 2, "short_sides": [60, 90], "long_side_max": 160, "steps": 12}
    return TrainLoader(dataset, augment=augment, seed=4, **(defaults | options))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_and_boxes_lie_on_the_pixels(images: CocoDataset, kind: str) -> None:
    found = [
        check_agreement(loaded.batch, row) for loaded in loader(images, KINDS[kind]) for row in range(2)
    ]
    assert sum(found) >= len(found) * 1.2, "hardly an object is left"
