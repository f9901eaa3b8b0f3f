"""What reading and checking an annotation file costs, of a set that is made up."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import orjson
from PIL import Image

from fastmrcnn.data.coco import read_coco
from fastmrcnn.speed.markdown import table
from fastmrcnn.speed.starting import measure_starts

HEIGHT, WIDTH, PER_IMAGE, POINTS, CLASSES = 480, 640, 7, 30, 7  # about COCO's
MOST_JUDGED = 200_000  # annotations
PIECE = 10_000  # annotations that are written at once


def measure_reading(annotations: int = 100_000, images: int | None = None) -> dict[str, Any]:
    """Processor seconds, on one core, in which `read_coco` reads a set of ellipses, for training (its numbers
    are packed) and for evaluation (they are kept, too); and of starts, as `measure_starts` has them.

    Args:
        images: as in `write_ellipses`.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = write_ellipses(folder, annotations, images)
        found: dict[str, Any] = {"annotations": annotations, "megabytes": file.stat().st_size / 1e6}
        # A set to judge by is small: of a million annotations the tree alone would be ten gigabytes.
        for purpose in ("training", "evaluation") if annotations <= MOST_JUDGED else ():
            started = time.process_time()
            read_coco(folder, file, keep_tree=purpose == "evaluation")
            found[purpose] = time.process_time() - started
        found |= measure_starts(folder, file)
    return found


def write_ellipses(folder: Path, annotations: int, images: int | None = None) -> Path:
    """Images of noughts, and a file of as many annotations, each a polygon of 30 points.

    Args:
        images: among which the annotations are spread evenly; None: one for each 7.
    """
    images = images or -(-annotations // PER_IMAGE)
    picture = folder / "0.jpg"
    Image.new("L", (WIDTH, HEIGHT)).save(picture)
    pixels = picture.read_bytes()
    for index in range(1, images):  # each with a comment of its own, or they would be found to be one image
        comment = b"\xff\xfe\x00\x06" + index.to_bytes(4, "big")
        (folder / f"{index}.jpg").write_bytes(pixels[:2] + comment + pixels[2:])
    tree = {
        "categories": [{"id": index, "name": f"class {index}"} for index in range(CLASSES)],
        "images": [
            {"id": index, "file_name": f"{index}.jpg", "width": WIDTH, "height": HEIGHT}
            for index in range(images)
        ],
    }
    file = folder / "set.json"
    random = np.random.default_rng(0)
    with file.open("wb") as stream:  # piece by piece, since the whole would be gigabytes of objects
        stream.write(orjson.dumps(tree)[:-1] + b',"annotations":[')
        for start in range(0, annotations, PIECE):
            numbers = range(start, min(start + PIECE, annotations))
            entries = orjson.dumps(_ellipses(numbers, images, annotations, random))
            stream.write(b"," * (start > 0) + entries[1:-1])
        stream.write(b"]}")
    return file


def _ellipses(
    numbers: range, images: int, annotations: int, random: np.random.Generator
) -> list[dict[str, Any]]:
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    circle = np.stack((np.cos(angles), np.sin(angles)), 1)
    radii = random.uniform(5, 90, (len(numbers), 1, 2))
    polygons = (random.uniform(radii, (WIDTH, HEIGHT) - radii) + circle * radii).round(2)
    boxes = np.concatenate((polygons.min(1), np.ptp(polygons, 1)), 1)
    return [
        {
            "id": number + 1,
            "image_id": number * images // annotations,
            "category_id": number % CLASSES,
            "bbox": box,
            "area": area,
            "iscrowd": 0,
            "segmentation": [polygon],
        }
        for number, box, area, polygon in zip(
            numbers,
            boxes.tolist(),
            (np.pi * radii.prod((1, 2))).tolist(),
            polygons.reshape(len(numbers), -1).tolist(),
            strict=True,
        )
    ]


def reading_table(found: dict[str, Any]) -> str:
    size = f"{found['annotations']:,} annotations, {found['megabytes']:.0f} MB"
    names = {"training": f"{size}, for training", "evaluation": f"{size}, for evaluation"}
    rows = [[name, f"{found[key]:.2f}"] for key, name in names.items() if key in found]
    for key, what in (
        ("first", f"the first start, {found['kept_mb']:.0f} MB kept"),
        ("second", "the second"),
    ):
        one = found[key]
        rows.append([f"{size}, {what}", f"{one['processor_s']:.2f} ({one['wall_s']:.2f} s by the clock)"])
    rows.append(["making the loader", f"{found['second']['loader_s']:.2f}"])
    if found["worker_mb"] is not None:
        rows.append(["memory of a loader process beyond an empty one", f"{found['worker_mb']:.0f} MB"])
    return table(["reader", "seconds of one core"], rows)
