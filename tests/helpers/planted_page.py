"""A detector that finds the objects of the planted set, for tests of the page."""

from __future__ import annotations

from pathlib import Path

from batches import small_config
from planted import PlantedModel, write_set

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.detection.detector import Detector
from fastmrcnn.weights.card import ModelCard


def planted_detector(folder: Path) -> tuple[CocoDataset, Detector]:
    """Its objects have the scores 0.95, 0.75 and 0.55, in every image but number 2."""
    dataset = write_set(folder)
    config = small_config(
        data={
            "short_side_test": 75,
            "long_side_max": 130,
            "val": {"images": str(folder / "images"), "annotations": str(folder / "set.json")},
        }
    )
    card = ModelCard(config, dataset.class_names, dataset.category_ids)
    return dataset, Detector(PlantedModel(dataset), card)  # type: ignore[arg-type]
