"""What COCO's evaluation costs, of objects and results that are made up."""

from __future__ import annotations

import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.random import Generator
from pycocotools import mask as coco_mask

from fastmrcnn.evaluation.coco import evaluate_coco
from fastmrcnn.evaluation.engines import ENGINES
from fastmrcnn.speed.markdown import table

HEIGHT, WIDTH, OBJECTS, CLASSES, POINTS = 480, 640, 7, 80, 16  # about COCO's


def measure_judging(images: int = 5000, detections: int = 100) -> dict[str, Any]:
    """Seconds in which each engine computes box and mask AP of results, reading the annotations included; and
    those of the processor, all cores together."""
    tree, results = made_up(images, detections)
    found: dict[str, Any] = {"images": images, "detections": len(results), "cores": os.cpu_count()}
    numbers = []
    with tempfile.TemporaryDirectory() as name:
        file = Path(name) / "set.json"
        file.write_text(json.dumps(tree), encoding="utf-8")
        for engine in ENGINES:
            started, busy = time.perf_counter(), time.process_time()
            numbers.append(evaluate_coco(file, results, show=False, engine=engine))
            found[engine] = time.perf_counter() - started
            found[f"{engine}_processor"] = time.process_time() - busy
    found["same"] = repr(numbers[0]) == repr(numbers[1])  # NaN is NaN
    return found


def made_up(images: int, detections: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A COCO file of ellipses, and results of which four in ten are near an object."""
    random = np.random.default_rng(0)
    annotations: list[dict[str, Any]] = []
    results = []
    for image_id in range(1, images + 1):
        there = [random_box(random) for _ in range(random.integers(1, 2 * OBJECTS))]
        labels = random.integers(1, CLASSES + 1, len(there)).tolist()
        for box, label in zip(there, labels, strict=True):
            mask = ellipse(box)
            entry = {"id": len(annotations) + 1, "image_id": image_id, "category_id": label, "iscrowd": 0}
            area = float(coco_mask.area(mask))
            annotations.append({**entry, "bbox": box, "area": area, "segmentation": mask})
        for _ in range(detections):
            if random.random() < 0.4:
                index = int(random.integers(len(there)))
                x, y, w, h = np.array(there[index]) * random.normal(1, 0.05, 4)
                box, label = [float(v) for v in (x, y, min(w, WIDTH - x), min(h, HEIGHT - y))], labels[index]
            else:
                box, label = random_box(random), int(random.integers(1, CLASSES + 1))
            score = float(random.random())
            entry = {"image_id": image_id, "category_id": label, "score": score}
            results.append({**entry, "bbox": box, "segmentation": ellipse(box)})
    tree = {
        "images": [
            {"id": i, "file_name": f"{i}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, images + 1)
        ],
        "categories": [{"id": k, "name": f"class {k}"} for k in range(1, CLASSES + 1)],
        "annotations": annotations,
    }
    return tree, results


def random_box(random: Generator) -> list[float]:
    w, h = np.exp(random.uniform(np.log(8), np.log(250), 2))
    return [float(v) for v in (random.uniform(0, WIDTH - w), random.uniform(0, HEIGHT - h), w, h)]


def ellipse(box: list[float]) -> dict[str, Any]:
    """As RLE."""
    x, y, w, h = box
    angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
    points = np.stack((x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))), 1)
    [rle] = coco_mask.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def judging_table(found: dict[str, Any]) -> str:
    what = f"box and mask AP of {found['detections']:,} detections in {found['images']:,} images"
    rows = [
        [f"{what}, evaluate.engine={engine}", f"{found[engine]:.1f}", f"{found[f'{engine}_processor']:.1f}"]
        for engine in ENGINES
    ]
    return table(["evaluation", "seconds", "processor seconds"], rows) + (
        "" if found["same"] else "\nTheir numbers differ."
    )
