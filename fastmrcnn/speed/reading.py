"""What reading and checking an annotation file costs, of a set that is made up."""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmrcnn.data.coco import read_coco
from fastmrcnn.speed.markdown import table

HEIGHT, WIDTH, PER_IMAGE, POINTS, CLASSES = 480, 640, 7, 30, 7  # about COCO's


def measure_reading(annotations: int = 100_000) -> dict[str, Any]:
    """Processor seconds, on one core, in which `read_coco` reads a set of ellipses, for training (its numbers
    are packed) and for evaluation (they are kept, too)."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_ellipses(folder, annotations)
        found: dict[str, Any] = {"annotations": annotations, "megabytes": file.stat().st_size / 1e6}
        for purpose, keep_tree in (("training", False), ("evaluation", True)):
            started = time.process_time()
            read_coco(folder, file, keep_tree=keep_tree)
            found[purpose] = time.process_time() - started
    return found


def write_ellipses(folder: Path, annotations: int) -> Path:
    """Images of noughts, and a file of as many annotations, each a polygon of 30 points."""
    picture = folder / "0.jpg"
    Image.new("RGB", (WIDTH, HEIGHT)).save(picture)
    pixels = picture.read_bytes()
    images = -(-annotations // PER_IMAGE)
    for index in range(1, images):  # each with a comment of its own, or they would be found to be one image
        comment = b"\xff\xfe\x00\x06" + index.to_bytes(4, "big")
        (folder / f"{index}.jpg").write_bytes(pixels[:2] + comment + pixels[2:])
    random = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack((np.cos(angles), np.sin(angles)), 1)
    entries = []
    for index in range(annotations):
        radii = random.uniform(5, 90, 2)
        polygon = (random.uniform(radii, (WIDTH, HEIGHT) - radii) + circle * radii).round(2)
        low, sides = polygon.min(0), np.ptp(polygon, 0)
        entries.append(
            {
                "id": index + 1,
                "image_id": index // PER_IMAGE,
                "category_id": index % CLASSES,
                "bbox": [*low.tolist(), *sides.tolist()],
                "area": float(np.pi * np.prod(radii)),
                "iscrowd": 0,
                "segmentation": [polygon.ravel().tolist()],
            }
        )
    tree = {
        "images": [
            {"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT}
            for index in range(images)
        ],
        "annotations": entries,
        "categories": [{"id": index, "name": f"class {index}"} for index in range(CLASSES)],
    }
    file = folder / "set.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def reading_table(found: dict[str, Any]) -> str:
    size = f"{found['annotations']:,} annotations, {found['megabytes']:.0f} MB"
    rows = [[f"{size}, for {purpose}", f"{found[purpose]:.2f}"] for purpose in ("training", "evaluation")]
    return table(["reader", "seconds of one core"], rows)
