"""The embedded demo set: textured shapes on textured backgrounds, as PNG files and COCO JSON.

Everything is drawn from a seed. Shapes overlap and hide one another; what is annotated is what can be
seen. A shape that is whole is written as a polygon, one that is partly hidden or has a hole as RLE.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.data.painting import Mask, Points, contrasting, fill, runs, texture, write_split

CLASS_NAMES = ("circle", "square", "triangle", "star", "ring")
_RING = CLASS_NAMES.index("ring")
_MOST_HIDDEN = 0.4  # a shape of which more is hidden is left out
_NEGATIVE_SHARE = 0.04
_HOLE = 0.5  # of the ring's radius


def write_shapes(
    folder: str | Path, *, seed: int = 0, train: int = 400, val: int = 60, size: int = 128
) -> dict[str, Path]:
    """Write a training and a validation set.

    Args:
        train, val: images of each set; size: side of an image in pixels.
    Returns:
        train_images, train_annotations, val_images, val_annotations.
    """
    folder = Path(folder)
    paths: dict[str, Path] = {}
    for number, (split, count) in enumerate((("train", train), ("val", val))):
        images, annotations = folder / split, folder / f"{split}.json"
        categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
        chain = np.random.SeedSequence([seed, number])
        write_split(images, annotations, lambda rng: draw_image(rng, size), chain, count, categories)
        paths[f"{split}_images"], paths[f"{split}_annotations"] = images, annotations
    return paths


def draw_image(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One image (size, size, 3) uint8, and its COCO annotations without ids."""
    background = rng.uniform(60, 195, 3)
    y, x = np.indices((size, size), np.float32).reshape(2, -1)
    canvas = texture(rng, x, y, background, contrast=10).reshape(size, size, 3)
    negative = rng.random() < _NEGATIVE_SHARE
    shapes = [] if negative else [_place(rng, size) for _ in range(rng.integers(2, 4))]
    hidden = np.zeros((size, size), np.bool_)
    kept = []
    for kind, outline in shapes:  # from front to back
        mask = fill(outline, size)
        if kind == _RING:
            centre = outline.mean(axis=0)
            mask &= ~fill(centre + (outline - centre) * _HOLE, size)
        visible = mask & ~hidden
        if visible.sum() < max(1, (1 - _MOST_HIDDEN) * mask.sum()):
            continue
        whole = bool((visible == mask).all())
        hidden |= mask
        y, x = (axis.astype(np.float32) for axis in np.nonzero(visible))
        canvas[visible] = texture(rng, x, y, contrasting(rng, background), contrast=25)
        kept.append(_annotation(rng, kind, outline, visible, whole))
    canvas += 4 * rng.standard_normal(canvas.shape, np.float32)
    return np.clip(canvas, 0, 255).astype(np.uint8), kept


def _annotation(
    rng: np.random.Generator, kind: int, outline: Points, visible: Mask, whole: bool
) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(visible, dtype=np.uint8))
    segmentation: Any
    if whole and kind != _RING:
        segmentation = [outline.ravel().tolist()]
    elif rng.random() < 0.5:
        segmentation = {"size": list(visible.shape), "counts": runs(visible)}
    else:
        segmentation = {"size": list(visible.shape), "counts": rle["counts"].decode("ascii")}
    return {
        "category_id": kind + 1,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


_MOST_TURN = np.pi / 12


def _place(rng: np.random.Generator, size: int) -> tuple[int, Points]:
    """Class and outline (n, 2) of a shape that lies within the image for the most part."""
    kind = int(rng.integers(len(CLASS_NAMES)))
    radius = size * rng.uniform(0.14, 0.25)
    centre = rng.uniform(0.8 * radius, size - 0.8 * radius, 2)
    unit = _OUTLINES[kind]()
    angle = rng.uniform(-_MOST_TURN, _MOST_TURN)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    return kind, np.round(unit @ turn.T * radius + centre, 2)


def _regular(corners: int) -> Points:
    angle = np.arange(corners) * 2 * np.pi / corners
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def _star() -> Points:
    points = _regular(10)
    points[1::2] *= 0.45
    return points


_OUTLINES: tuple[Callable[[], Points], ...] = (
    lambda: _regular(32),
    lambda: _regular(4),
    lambda: _regular(3),
    _star,
    lambda: _regular(32),
)
