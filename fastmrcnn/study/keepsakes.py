"""What of a run the report keeps besides numbers: pictures, and a map of features to explain RoIAlign on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.data.build import read_split
from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.images import read_image
from fastmrcnn.data.loader import prepare_images
from fastmrcnn.detection.detector import Detector, load
from fastmrcnn.detection.draw import draw_objects
from fastmrcnn.evaluation.run import annotated_objects
from fastmrcnn.files import make_folder, replacing, write_json
from fastmrcnn.model.mask_rcnn import MaskRCNN

SHOWN = (2, 3)  # validation images, counted from 0
SIDE = 320  # of a picture, in pixels
SCORE = 0.5


def keep_pictures(run: Path, output: Path, truth: Path) -> None:
    """What a run finds in the images SHOWN, and the ground truth if it is not there yet.

    Args:
        run: folder of a finished run.
        output, truth: folders.
    """
    detector = load(run, "cpu")
    dataset = read_split(detector.card.config, "val")
    skeleton = () if dataset.keypoints is None else dataset.keypoints.skeleton
    for index in SHOWN:
        record = dataset.records[index]
        pixels = read_image(record)[0]
        found = detector(pixels, SCORE)
        _save(output / f"{index}.png", found.draw())
        if not (truth / f"{index}.png").exists():
            drawn = draw_objects(pixels, annotated_objects(record, dataset), dataset.class_names, skeleton)
            _save(truth / f"{index}.png", drawn)


def keep_features(run: Path, path: Path) -> None:
    """The map that RoIs are cut from, of one image: the channel in which its largest object stands out most.

    Args:
        run: folder of a finished run whose model has one map.
        path: JSON file to write.
    """
    detector = load(run, "cpu")
    dataset = read_split(detector.card.config, "val")
    record = dataset.records[SHOWN[0]]
    pixels = read_image(record)[0]
    model = detector.model
    assert isinstance(model, MaskRCNN)
    maps, scale = features(detector, model, pixels)
    box = largest_box(dataset, SHOWN[0]) * scale
    assert model.rpn is not None
    stride = model.rpn.anchors.strides[0]
    x0, y0, x1, y1 = (int(value) for value in np.round(box / stride))
    inside = maps[:, y0 : max(y1, y0 + 1), x0 : max(x1, x0 + 1)].mean(axis=(1, 2))
    chosen = int(np.argmax((inside - maps.mean(axis=(1, 2))) / (maps.std(axis=(1, 2)) + 1e-6)))
    tree: dict[str, Any] = {
        "map": [[round(float(value), 4) for value in row] for row in maps[chosen]],
        "channel": chosen,
        "box": [round(float(value), 2) for value in box],
        "stride": stride,
    }
    make_folder(path.parent)
    write_json(path, tree)


def features(
    detector: Detector, model: MaskRCNN, pixels: NDArray[np.uint8]
) -> tuple[NDArray[np.float32], float]:
    """(C, h, w) of the one map, and input pixels for each pixel of the image."""
    data = detector.card.config.data
    batch, _ = prepare_images([pixels], data.short_side_test, data.long_side_max)
    with torch.no_grad():
        found = model.features(batch)[0][0]
    return found.float().numpy(), float(batch.sizes[0, 1]) / pixels.shape[1]


def largest_box(dataset: CocoDataset, index: int) -> NDArray[np.float64]:
    """xyxy in pixels of the image."""
    objects = annotated_objects(dataset.records[index], dataset)
    boxes = objects.boxes.astype(np.float64)
    return boxes[np.argmax((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]))]


def _save(path: Path, picture: NDArray[np.uint8]) -> None:
    make_folder(path.parent)
    small = Image.fromarray(picture).resize((SIDE, SIDE), Image.Resampling.LANCZOS)
    # 64 colours are enough for these scenes, and make a third of the file.
    with replacing(path) as stream:
        small.quantize(64).save(stream, format="PNG", optimize=True)
