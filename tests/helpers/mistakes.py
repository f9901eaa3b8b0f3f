"""A valid COCO file, and random mistakes in it."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

HEIGHT, WIDTH = 40, 60


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


def quiet(max_examples: int) -> settings:
    return settings(deadline=None, suppress_health_check=list(HealthCheck), max_examples=max_examples)
