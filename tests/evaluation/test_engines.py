"""Every engine gives pycocotools' numbers, to the last bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mistakes import quiet
from numpy.random import Generator
from pycocotools import mask as coco_mask

from fastmrcnn.evaluation.coco import evaluate_coco

HEIGHT, WIDTH = 120, 160
KINDS = ("bbox", "segm", "keypoints")


def random_box(random: Generator) -> list[float]:
    w, h = np.exp(random.uniform(np.log(2), np.log([WIDTH - 1, HEIGHT - 1])))
    return [float(v) for v in (random.uniform(0, WIDTH - w), random.uniform(0, HEIGHT - h), w, h)]


def ellipse(box: list[float]) -> dict[str, Any]:
    x, y, w, h = box
    angles = np.linspace(0, 2 * np.pi, 12, endpoint=False)
    points = np.stack((x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))), 1)
    [rle] = coco_mask.frPyObjects([points.ravel().tolist()], HEIGHT, WIDTH)
    return {"size": rle["size"], "counts": rle["counts"].decode()}


def keypoints(box: list[float], count: int, random: Generator) -> list[float]:
    points = np.array(box[:2]) + random.uniform(0, 1, (count, 2)) * box[2:]
    return [float(v) for v in np.column_stack((points, random.integers(0, 3, count))).ravel()]


def adversarial(
    seed: int, images: int, classes: int, objects: int, detections: int, joints: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Objects and detections near them: with crowds, images without either, equal scores, ids from 0, and
    classes that no object has."""
    random = np.random.default_rng(seed)
    names = {"keypoints": [f"joint {k}" for k in range(joints)], "skeleton": []}
    tree: dict[str, Any] = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in range(images)
        ],
        "categories": [{"id": 3 * k, "name": f"class {k}", **names} for k in range(classes)],
        "annotations": [],
    }
    results = []
    for image_id in range(images):
        there = []
        for _ in range(random.integers(0, objects + 1)):
            box, joint = random_box(random), 3 * int(random.integers(0, max(classes - 1, 1)))
            there.append((box, joint))
            points = keypoints(box, joints, random) if random.random() < 0.8 else [0.0] * 3 * joints
            tree["annotations"].append(
                {
                    "id": len(tree["annotations"]),
                    "image_id": image_id,
                    "category_id": joint,
                    "bbox": box,
                    "area": box[2] * box[3] * float(random.choice([0.5, 0.78, 1])),
                    "iscrowd": int(random.random() < 0.15),
                    "segmentation": ellipse(box),
                    "keypoints": points,
                    "num_keypoints": sum(flag > 0 for flag in points[2::3]),
                }
            )
        for _ in range(random.integers(0, detections + 1)):
            box, label = random_box(random), 3 * int(random.integers(0, classes))
            if there and random.random() < 0.7:
                known, label = there[random.integers(len(there))]
                x, y, w, h = np.array(known) * random.choice([1, 1.01, 1.1, 0.8], 4)
                box = [float(v) for v in (min(x, WIDTH - 2), min(y, HEIGHT - 2), w, h)]
            results.append(
                {
                    "image_id": image_id,
                    "category_id": label,
                    "bbox": box,
                    "segmentation": ellipse(box),
                    "keypoints": keypoints(box, joints, random),
                    "score": float(random.integers(0, 12)) / 11,
                }
            )
    return tree, results


def compare(
    file: Path, tree: dict[str, Any], results: list[dict[str, Any]], **options: Any
) -> dict[str, float]:
    file.write_text(json.dumps(tree))
    ours, reference = (
        evaluate_coco(file, results, KINDS, show=False, engine=engine, **options)
        for engine in ("auto", "pycocotools")
    )
    np.testing.assert_equal(ours, reference)
    return ours


@quiet(max_examples=40)
@given(
    seed=st.integers(0, 2**32),
    images=st.integers(1, 6),
    classes=st.integers(1, 4),
    objects=st.integers(0, 8),
    detections=st.integers(0, 40),
    joints=st.sampled_from([1, 3, 17]),
    max_dets=st.sampled_from([None, 11, 30, 300]),
    some=st.booleans(),
)
def test_numbers_are_pycocotools_own(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    images: int,
    classes: int,
    objects: int,
    detections: int,
    joints: int,
    max_dets: int | None,
    some: bool,
) -> None:
    tree, results = adversarial(seed, images, classes, objects, detections, joints)
    chosen = list(range(0, images, 2)) if some else None
    compare(tmp_path_factory.getbasetemp() / "set.json", tree, results, max_dets=max_dets, image_ids=chosen)


def test_many_detections(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """More than count, most with the same score; and the table is the same."""
    tree, results = adversarial(1, images=3, classes=2, objects=30, detections=700, joints=3)
    values = compare(tmp_path / "set.json", tree, results)
    assert 5 < values["segm/AP"] < 90
    tables = []
    for engine in ("auto", "pycocotools"):
        evaluate_coco(tmp_path / "set.json", results, KINDS, max_dets=200, engine=engine)  # type: ignore[arg-type]
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    assert "maxDets=200" in tables[0]


def test_nothing_found_and_nothing_to_find(tmp_path: Path) -> None:
    tree, results = adversarial(2, images=2, classes=2, objects=4, detections=5, joints=3)
    assert compare(tmp_path / "set.json", tree, [])["bbox/AP"] == 0
    tree["annotations"] = []
    assert np.isnan(compare(tmp_path / "set.json", tree, results)["bbox/AP"])


def test_sigmas(tmp_path: Path) -> None:
    tree, results = adversarial(3, images=4, classes=1, objects=6, detections=30, joints=3)
    wide = compare(tmp_path / "set.json", tree, results, oks_sigmas=[0.9, 0.5, 0.7])
    assert wide["keypoints/AP"] > compare(tmp_path / "set.json", tree, results)["keypoints/AP"]


def test_what_cannot_be_written_and_is_not_needed(tmp_path: Path) -> None:
    tree, results = adversarial(4, images=2, classes=2, objects=4, detections=9, joints=3)
    plain = compare(tmp_path / "set.json", tree, results)
    half = "\ud800"
    tree |= {"info": half, "licenses": [half]}
    for entry in (*tree["images"], *tree["annotations"], *tree["categories"], *results):
        entry["note"] = half
    np.testing.assert_equal(compare(tmp_path / "set.json", tree, results), plain)
