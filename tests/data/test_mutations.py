"""Random mistakes in a COCO file: each is read, with what is left out counted, or refused in one line."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmrcnn.data.coco import CocoDataset, read_coco
from fastmrcnn.data.keypoints import KeypointOptions
from fastmrcnn.data.masks import rasterise
from fastmrcnn.errors import UserError
from fastmrcnn.evaluation.coco import evaluate_coco

HEIGHT, WIDTH = 40, 60
KINDS = ("bbox", "segm", "keypoints")


def valid() -> dict[str, Any]:
    """Polygons, runs and keypoints of two classes in two images, and a crowd region."""
    boxes = [(4, 6, 20, 16), (30, 10, 12, 24), (6, 4, 30, 12), (40, 20, 16, 16), (8, 20, 10, 10)]
    annotations = []
    for number, (x, y, w, h) in enumerate(boxes, start=1):
        polygon = [[x, y, x + w, y, x + w, y + h, x, y + h]]
        row = [HEIGHT * x + y, *[h, HEIGHT - h] * (w - 1), h]
        runs = {"size": [HEIGHT, WIDTH], "counts": [*row, HEIGHT * WIDTH - sum(row)]}
        annotations.append(
            {
                "id": number,
                "image_id": 1 if number < 3 else 2,
                "category_id": 1 + number % 2,
                "bbox": [x, y, w, h],
                "area": w * h,
                "iscrowd": int(number == 5),
                "segmentation": runs if number in (2, 5) else polygon,
                "keypoints": [x + 2, y + 2, 2, x + 5, y + 3, 1, 0, 0, 0],
                "num_keypoints": 2,
            }
        )
    names = {"keypoints": ["a", "b", "c"], "skeleton": [[1, 2]]}
    return {
        "images": [{"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)],
        "annotations": annotations,
        "categories": [{"id": 1, "name": "disc", **names}, {"id": 2, "name": "box", **names}],
    }


def places(node: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [place for key, child in children for place in ((*path, key), *places(child, (*path, key)))]


PLACES = places(valid())
JUNK: list[Any] = [
    None, True, False, 0, -1, 1.5, 2**53 + 1, 10**30, 10**400, -(10**30), math.nan, math.inf, -math.inf,
    1e-320, "", "x", "1", "2.0", "nan", "\ud800", "a\0b", [], {}, [[]], [None], [[1, 2]], {"id": 1},
    {"size": [1]},
]  # fmt: skip
CHANGES = ("junk", "gone", "text", "nested", "negative", "tenth", "hundredfold", "twice", "swapped")


@st.composite
def mistakes(draw: st.DrawFn) -> dict[str, Any]:
    """A valid file with up to three changes, each at one place or at the same place of every entry."""
    tree = valid()
    for _ in range(draw(st.integers(1, 3))):
        place, change = draw(st.sampled_from(PLACES)), draw(st.sampled_from(CHANGES))
        junk = draw(st.sampled_from(JUNK))
        everywhere = len(place) > 2 and draw(st.booleans())
        parts = range(len(tree[place[0]])) if everywhere and isinstance(tree.get(place[0]), list) else ()
        for one in [(place[0], index, *place[2:]) for index in parts] or [place]:
            mutate(tree, one, change, junk)
    return tree


def mutate(tree: Any, place: tuple[Any, ...], change: str, junk: Any) -> None:
    node = tree
    try:
        for key in place[:-1]:
            node = node[key]
        key, value = place[-1], node[place[-1]]
    except (KeyError, IndexError, TypeError):
        return  # an earlier change removed it
    if isinstance(node, str):
        return
    number = isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) > 1e300
    if change == "gone":
        del node[key]
    elif change == "text":
        node[key] = str(value)
    elif change == "nested":
        node[key] = [value]
    elif change == "negative" and number:
        node[key] = -value
    elif change == "tenth" and number:
        node[key] = value / 10
    elif change == "hundredfold" and number:
        node[key] = value * 100
    elif change == "twice" and isinstance(node, list):
        node.append(copy.deepcopy(value))
    elif change == "swapped" and isinstance(value, list):
        value.reverse()
    else:
        node[key] = copy.deepcopy(junk)


def write(folder: Path, tree: Any) -> Path:
    images = folder / "images"
    if not images.exists():
        images.mkdir()
        for index in (1, 2):
            Image.new("RGB", (WIDTH, HEIGHT), (90 * index, 60, 30)).save(images / f"{index}.png")
    file = folder / "set.json"
    file.write_text(json.dumps(tree))
    return file


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


quiet = settings(deadline=None, suppress_health_check=list(HealthCheck))


@settings(quiet, max_examples=200)
@given(mistakes())
def test_mistakes_are_refused_or_counted(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[str, Any]
) -> None:
    check(tmp_path_factory.getbasetemp(), tree)


@pytest.mark.slow
@settings(quiet, max_examples=5000)
@given(mistakes())
def test_many_mistakes(tmp_path_factory: pytest.TempPathFactory, tree: Any) -> None:
    check(tmp_path_factory.getbasetemp(), tree)
