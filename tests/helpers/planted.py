"""A small data set on disk, and a model that finds in it what a test wants it to find.

Every image is of one colour, which says to the model which image it looks at, through any resize.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as coco_mask
from torch import Tensor, nn

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.structures import Batch, Detections

SIDE, SLOTS = 28, 12
SIZES = {11: (60, 92), 5: (100, 40), 8: (64, 64), 2: (33, 71)}  # height, width by image id
CATEGORIES = [{"id": 7, "name": "disc"}, {"id": 3, "name": "box"}, {"id": 20, "name": "absent"}]


def disc(height: int, width: int, x: float, y: float, a: float, b: float) -> np.ndarray:
    yy, xx = np.mgrid[:height, :width] + 0.5
    return ((xx - x) / a) ** 2 + ((yy - y) / b) ** 2 <= 1


def annotations() -> list[dict[str, Any]]:
    """Discs as RLE, boxes as polygons, one crowd region; image 2 has none."""
    found: list[dict[str, Any]] = []

    def add(image: int, category: int, bitmap: np.ndarray, shape: Any, crowd: int = 0) -> None:
        rle = coco_mask.encode(np.asfortranarray(bitmap.astype(np.uint8)))
        if shape is None:
            shape = {"size": rle["size"], "counts": rle["counts"].decode()}
        box = coco_mask.toBbox(rle).tolist()
        found.append(
            {
                "id": len(found) + 1,
                "image_id": image,
                "category_id": category,
                "bbox": box,
                "segmentation": shape,
                "area": float(coco_mask.area(rle)),
                "iscrowd": crowd,
            }
        )

    for image in (11, 5, 8):
        height, width = SIZES[image]
        add(image, 7, disc(height, width, width * 0.3, height * 0.35, width * 0.25, height * 0.3), None)
        add(image, 7, disc(height, width, width * 0.75, height * 0.7, width * 0.2, height * 0.25), None)
        x0, y0, x1, y1 = width // 8, height * 3 // 4, width // 2, height - 2
        square = np.zeros((height, width), dtype=bool)
        square[y0:y1, x0:x1] = True
        add(image, 3, square, [[x0, y0, x1, y0, x1, y1, x0, y1]])
    runs = [60 * 80, 60 * 12]
    region = np.zeros((60, 92), dtype=bool)
    region[:, 80:] = True
    add(11, 3, region, {"size": [60, 92], "counts": runs}, crowd=1)
    return found


def write_set(folder: Path, drop: tuple[str, ...] = (), categories: Any = CATEGORIES) -> CocoDataset:
    """Write images and annotations, without the keys in `drop`; returns what `read_coco` makes of them."""
    images = folder / "images"
    images.mkdir(parents=True)
    for image, (height, width) in SIZES.items():
        Image.fromarray(np.full((height, width, 3), image * 10, np.uint8)).save(images / f"{image}.png")
    entries = [{k: v for k, v in entry.items() if k not in drop} for entry in annotations()]
    known = {category["id"] for category in categories}
    tree = {
        "images": [
            {"id": image, "file_name": f"{image}.png", "height": height, "width": width}
            for image, (height, width) in SIZES.items()
        ],
        "annotations": [entry for entry in entries if entry["category_id"] in known],
        "categories": categories,
    }
    (folder / "set.json").write_text(json.dumps(tree))
    return read_coco(images, folder / "set.json")


class PlantedModel(nn.Module):
    """Gives the objects of a data set as its detections, changed by `change(boxes, classes, scores)`."""

    def __init__(
        self,
        dataset: CocoDataset,
        change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]] | None = None,
        cut: int = 0,
    ) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.records = {record.image_id: record for record in dataset.records}
        self.change = change or (lambda *found: found)
        self.cut = cut
        self.seen: list[tuple[int, ...]] = []  # shapes of the batches

    def forward(self, batch: Batch) -> Detections:
        self.seen.append(tuple(batch.pixels.shape))
        images = len(batch.pixels)
        boxes, scores = torch.zeros(images, SLOTS, 4), torch.zeros(images, SLOTS)
        classes = torch.zeros(images, SLOTS, dtype=torch.int64)
        valid = torch.zeros(images, SLOTS, dtype=torch.bool)
        masks = torch.zeros(images, SLOTS, SIDE, SIDE)
        for index in range(images):
            record = self.records[round(int(batch.pixels[index, 0, 0, 0]) / 10)]
            objects = [item for item in record.objects if not item.crowd]
            if not objects:
                continue
            ratio = batch.sizes[index].flip(0) / torch.tensor([record.width, record.height])
            found = torch.tensor([item.box for item in objects]) * ratio.repeat(2)
            labels = torch.tensor([item.class_index for item in objects])
            found, labels, score = self.change(found, labels, torch.linspace(0.95, 0.55, len(objects)))
            # Not the first slots: what stands in the others must not matter.
            slots = slice(2, 2 + len(objects))
            boxes[index, slots], classes[index, slots], scores[index, slots] = found, labels, score
            valid[index, slots] = True
            for slot, item in enumerate(objects, start=2):
                round_one = isinstance(item.segmentation, dict)
                shape = disc(SIDE, SIDE, SIDE / 2, SIDE / 2, SIDE / 2, SIDE / 2)
                masks[index, slot] = torch.from_numpy(shape) if round_one else 1.0
        return Detections(boxes, scores, classes, valid, torch.full((images,), self.cut), masks)
