"""A COCO set of arrows, drawn from a seed, with four keypoints: tip, centre, and the left and the right barb.

Left and right are those of the arrow, so that a mirror image exchanges them.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

NAMES = ["tip", "centre", "left_barb", "right_barb"]
SKELETON = [[1, 2], [2, 3], [2, 4]]


def write_arrows(folder: Path, seed: int, images: int, size: int = 64, masks: bool = True) -> Path:
    """Draw images with one or two arrows each; returns the annotation file, beside its images."""
    folder.mkdir(parents=True)
    r = np.random.default_rng(seed)
    tree: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 4, "name": "arrow", "keypoints": NAMES, "skeleton": SKELETON}],
    }
    for image in range(1, images + 1):
        canvas = Image.fromarray(r.integers(0, 60, (size, size, 3), dtype=np.uint8))
        pen = ImageDraw.Draw(canvas)
        for half in range(int(r.integers(1, 3))):
            points, outline = arrow(r, size, half)
            pen.polygon(outline.ravel().tolist(), fill=tuple(r.integers(150, 256, 3).tolist()))
            tree["annotations"].append(
                annotation(len(tree["annotations"]) + 1, image, points, outline, masks)
            )
        canvas.save(folder / f"{image}.png")
        tree["images"].append({"id": image, "file_name": f"{image}.png", "width": size, "height": size})
    file = folder / "set.json"
    file.write_text(json.dumps(tree), encoding="utf-8")
    return file


def arrow(r: np.random.Generator, size: int, half: int) -> tuple[np.ndarray, np.ndarray]:
    """Keypoints (4, 2) and outline (4, 2), in the left or the right half of the image."""
    length = size * r.uniform(0.3, 0.42)
    angle = r.uniform(-0.6, 0.6)
    along = np.array([np.sin(angle), -np.cos(angle)])
    across = np.array([np.cos(angle), np.sin(angle)])
    middle = np.array([size * (0.27 + 0.46 * half), size * r.uniform(0.35, 0.65)])
    tip, centre = middle + along * length / 2, middle - along * length / 5
    left, right = (middle - along * length / 2 + side * across * length / 2.4 for side in (-1, 1))
    return np.array([tip, centre, left, right]), np.array([tip, right, centre, left])


def annotation(
    identifier: int, image: int, points: np.ndarray, outline: np.ndarray, masks: bool
) -> dict[str, Any]:
    """The centre is marked as hidden; places are pixels' numbers, half a pixel less than coordinates."""
    low, high = outline.min(axis=0), outline.max(axis=0)
    x, y = outline[:, 0], outline[:, 1]
    entry = {
        "id": identifier,
        "image_id": image,
        "category_id": 4,
        "bbox": [*low.tolist(), *(high - low).tolist()],
        "area": float(abs(np.dot(x, np.roll(y, 1)) - np.dot(y, np.roll(x, 1))) / 2),
        "iscrowd": 0,
        "num_keypoints": len(points),
        "keypoints": [
            number
            for (px, py), flag in zip((points - 0.5).tolist(), (2, 1, 2, 2), strict=True)
            for number in (px, py, flag)
        ],
    }
    if masks:
        entry["segmentation"] = [outline.ravel().tolist()]
    return entry
