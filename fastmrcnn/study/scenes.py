"""Two embedded data sets on which the paper's claims can be told apart, drawn from a seed.

`objects`: small shapes with thin parts, in pairs of classes that look alike and hide one another: a ring and
a ring with a gap, a cross and a T, stars of five and of six points. Where thin parts lie to the pixel decides
AP75; which of two lookalikes a pixel belongs to decides whether classes should compete.

`figures`: people of sticks in all poses, one dark and one light side, with masks and eleven keypoints.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.data.painting import Drawn, Mask, Points, contrasting, fill, runs, texture, write_split

OBJECT_NAMES = ("ring", "open ring", "cross", "tee", "five-pointed star", "six-pointed star")
KEYPOINT_NAMES = (
    "head",
    "neck",
    "hip",
    "dark elbow",
    "dark hand",
    "light elbow",
    "light hand",
    "dark knee",
    "dark foot",
    "light knee",
    "light foot",
)
_BONES = (
    (1, 2),
    (2, 3),
    (2, 4),
    (4, 5),
    (2, 6),
    (6, 7),
    (3, 8),
    (8, 9),
    (3, 10),
    (10, 11),
)
_MOST_HIDDEN = 0.5  # an object of which more is hidden is left out
_CORNERS = 24  # of a round outline


class SceneSet(NamedTuple):
    """One of the sets: what draws an image of a side, and COCO's categories."""

    draw: Callable[[np.random.Generator, int], Drawn]
    categories: list[dict[str, Any]]


class _Part(NamedTuple):
    """A polygon that is filled, or cut out of those before it."""

    outline: Points
    shade: float = 0.0  # added to the colour
    hole: bool = False


class _Object(NamedTuple):
    label: int
    parts: list[_Part]
    keypoints: Points | None = None  # (J, 2)


def write_scenes(
    folder: Path, name: str, *, seed: int = 0, train: int, val: int, size: int = 160
) -> dict[str, Path]:
    """Write a training and a validation set of SETS[name].

    Args:
        train, val: images of each; size: side of an image in pixels.
    Returns:
        train_images, train_annotations, val_images, val_annotations.
    """
    paths: dict[str, Path] = {}
    folder.mkdir(parents=True, exist_ok=True)
    scene = SETS[name]
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        images, annotations = folder / split, folder / f"{split}.json"
        chain = np.random.SeedSequence([seed, list(SETS).index(name), number])
        write_split(images, annotations, lambda rng: scene.draw(rng, size), chain, count, scene.categories)
        paths[f"{split}_images"], paths[f"{split}_annotations"] = images, annotations
    return paths


def draw_objects_scene(rng: np.random.Generator, size: int) -> Drawn:
    """Four to nine shapes; every second one overlaps an earlier one, half of these a lookalike."""
    found: list[_Object] = []
    places: list[tuple[int, Points, float]] = []
    for _ in range(int(rng.integers(4, 10))):
        radius = size * float(np.exp(rng.uniform(np.log(0.045), np.log(0.14))))
        label = int(rng.integers(len(OBJECT_NAMES)))
        centre = rng.uniform(radius, size - radius, 2)
        if places and rng.random() < 0.5:
            other, at, its_radius = places[int(rng.integers(len(places)))]
            if rng.random() < 0.5:
                label = other ^ 1  # the lookalike
            angle = rng.uniform(0, 2 * np.pi)
            apart = (radius + its_radius) * rng.uniform(0.5, 0.9)
            centre = np.clip(at + apart * np.array([np.cos(angle), np.sin(angle)]), radius, size - radius)
        places.append((label, centre, radius))
        turn = _turn(rng.uniform(0, 2 * np.pi))
        parts = [
            _Part(outline @ turn.T * radius + centre, hole=hole) for outline, hole in _SHAPES[label](rng)
        ]
        found.append(_Object(label, parts))
    return _paint(rng, size, found)


def draw_figures_scene(rng: np.random.Generator, size: int) -> Drawn:
    """One to three figures in all poses."""
    found = []
    for _ in range(int(rng.integers(1, 4))):
        height = size * rng.uniform(0.3, 0.7)
        centre = rng.uniform(0.3 * height, size - 0.3 * height, 2)
        found.append(_figure(rng, height, centre))
    return _paint(rng, size, found)


def _figure(rng: np.random.Generator, height: float, centre: Points) -> _Object:
    """Sticks of a body that stands more or less upright."""
    lean = rng.normal(0, 0.25)
    up = np.array([np.sin(lean), -np.cos(lean)])

    def limb(start: Points, upper: float, lower: float, angle: float, bend: float) -> tuple[Points, Points]:
        middle = start + upper * _along(angle)
        return middle, middle + lower * _along(angle + bend)

    hip = centre
    neck = hip + 0.30 * height * up
    head = neck + 0.13 * height * up
    down = np.arctan2(-up[1], -up[0])
    side = 1 if rng.random() < 0.5 else -1  # on which the dark limbs are
    points = [head, neck, hip]
    for sign in (side, -side):
        points += limb(
            neck,
            0.17 * height,
            0.16 * height,
            down + sign * rng.uniform(0.2, 2.4),
            sign * rng.uniform(-0.2, 1.6),
        )
    for sign in (side, -side):
        points += limb(
            hip,
            0.23 * height,
            0.22 * height,
            down + sign * rng.uniform(0.05, 1.0),
            -sign * rng.uniform(-0.1, 1.0),
        )
    thick = height * rng.uniform(0.035, 0.05)
    dark, light = -55.0, 55.0
    sticks = [
        (1, 2, 1.7, 0.0),
        *((a, b, 1.0, dark) for a, b in ((1, 3), (3, 4), (2, 7), (7, 8))),
        *((a, b, 1.0, light) for a, b in ((1, 5), (5, 6), (2, 9), (9, 10))),
    ]
    parts = [_Part(_stick(points[a], points[b], thick * wide), shade) for a, b, wide, shade in sticks]
    parts.append(_Part(_regular(_CORNERS) * 0.085 * height + head))
    return _Object(0, parts, np.array(points))


def _paint(rng: np.random.Generator, size: int, objects: list[_Object]) -> Drawn:
    """Pixels and annotations of objects that are given from front to back."""
    background = rng.uniform(70, 185, 3)
    y, x = np.indices((size, size), np.float32).reshape(2, -1)
    canvas = texture(rng, x, y, background, contrast=14).reshape(size, size, 3)
    hidden = np.zeros((size, size), np.bool_)
    kept = []
    for one in objects:
        mask = np.zeros((size, size), np.bool_)
        shade = np.zeros((size, size), np.float32)
        for part in one.parts:
            area = fill(part.outline, size)
            mask = mask & ~area if part.hole else mask | area
            shade[area] = part.shade
        visible = mask & ~hidden
        if visible.sum() < max(4, (1 - _MOST_HIDDEN) * mask.sum()):
            continue
        y, x = (axis.astype(np.float32) for axis in np.nonzero(visible))
        colours = texture(rng, x, y, contrasting(rng, background), contrast=20)
        canvas[visible] = colours + shade[visible][:, None]
        kept.append(_annotation(one, visible, hidden))
        hidden |= mask
    canvas += 6 * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), kept


def _annotation(one: _Object, visible: Mask, hidden: Mask) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
    entry: dict[str, Any] = {
        "category_id": one.label + 1,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": {"size": list(visible.shape), "counts": runs(visible)},
    }
    if one.keypoints is not None:
        entry["keypoints"] = []
        for x, y in one.keypoints:
            column, row = int(np.floor(x)), int(np.floor(y))
            inside = 0 <= row < visible.shape[0] and 0 <= column < visible.shape[1]
            flag = 0 if not inside else 1 if hidden[row, column] else 2
            # A file numbers pixels, whose centres lie half a pixel further.
            entry["keypoints"] += [round(x - 0.5, 2), round(y - 0.5, 2), flag] if flag else [0, 0, 0]
        entry["num_keypoints"] = sum(flag > 0 for flag in entry["keypoints"][2::3])
    return entry


def _turn(angle: float) -> NDArray[np.float64]:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _along(angle: float) -> Points:
    return np.array([np.cos(angle), np.sin(angle)])


def _regular(corners: int) -> Points:
    angle = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _stick(start: Points, end: Points, thick: float) -> Points:
    """A bar with round ends, `thick` wide."""
    way = end - start
    angle = np.arctan2(way[1], way[0])
    half = np.linspace(-np.pi / 2, np.pi / 2, _CORNERS // 2)
    cap = np.stack([np.cos(half), np.sin(half)], axis=1) * thick / 2
    turn = _turn(angle)
    return np.concatenate([cap @ turn.T + end, -cap @ turn.T + start])


def _bar(x: float, y: float, width: float, height: float) -> Points:
    return np.array([[x, y], [x + width, y], [x + width, y + height], [x, y + height]])


def _ring(rng: np.random.Generator) -> list[tuple[Points, bool]]:
    return [(_regular(_CORNERS), False), (_regular(_CORNERS) * 0.62, True)]


def _open_ring(rng: np.random.Generator) -> list[tuple[Points, bool]]:
    half = rng.uniform(0.45, 0.65)
    gap = np.array([[0, 0], *(1.5 * _along(a) for a in (-half, half))])
    return [*_ring(rng), (gap, True)]


def _cross(rng: np.random.Generator) -> list[tuple[Points, bool]]:
    return [(_bar(-1, -0.16, 2, 0.32), False), (_bar(-0.16, -1, 0.32, 2), False)]


def _tee(rng: np.random.Generator) -> list[tuple[Points, bool]]:
    return [(_bar(-1, -0.16, 2, 0.32), False), (_bar(-0.16, -0.16, 0.32, 1.16), False)]


def _star(points: int) -> Callable[[np.random.Generator], list[tuple[Points, bool]]]:
    def outline(rng: np.random.Generator) -> list[tuple[Points, bool]]:
        corners = _regular(2 * points)
        corners[1::2] *= 0.5
        return [(corners, False)]

    return outline


_SHAPES = (_ring, _open_ring, _cross, _tee, _star(5), _star(6))

SETS = {
    "objects": SceneSet(
        draw_objects_scene, [{"id": i, "name": name} for i, name in enumerate(OBJECT_NAMES, start=1)]
    ),
    "figures": SceneSet(
        draw_figures_scene,
        [
            {
                "id": 1,
                "name": "figure",
                "keypoints": list(KEYPOINT_NAMES),
                "skeleton": [list(bone) for bone in _BONES],
            }
        ],
    ),
}
