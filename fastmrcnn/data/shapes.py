"""The embedded demo set: textured shapes on textured backgrounds, as PNG files and COCO JSON.

Everything is drawn from a seed. Shapes overlap and hide one another; what is annotated is what can be
seen. A shape that is whole is written as a polygon, one that is partly hidden or has a hole as RLE.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

CLASS_NAMES = ("circle", "square", "triangle", "star", "ring")
_RING = CLASS_NAMES.index("ring")
_MOST_HIDDEN = 0.4  # a shape of which more is hidden is left out
_NEGATIVE_SHARE = 0.04
_HOLE = 0.5  # of the ring's radius

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]
Coordinates = NDArray[np.float32]


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
        images.mkdir(parents=True, exist_ok=True)
        tree = _write_split(images, np.random.SeedSequence([seed, number]), count, size)
        annotations.write_text(json.dumps(tree), encoding="utf-8")
        paths[f"{split}_images"], paths[f"{split}_annotations"] = images, annotations
    return paths


def _write_split(folder: Path, seed: np.random.SeedSequence, count: int, size: int) -> dict[str, Any]:
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for image_id, child in enumerate(seed.spawn(count), start=1):
        pixels, objects = draw_image(np.random.default_rng(child), size)
        name = f"{image_id:05d}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        images.append({"id": image_id, "file_name": name, "width": size, "height": size})
        for entry in objects:
            annotations.append({"id": len(annotations) + 1, "image_id": image_id, **entry})
    categories = [{"id": i, "name": name} for i, name in enumerate(CLASS_NAMES, start=1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def draw_image(rng: np.random.Generator, size: int) -> tuple[NDArray[np.uint8], list[dict[str, Any]]]:
    """One image (size, size, 3) uint8, and its COCO annotations without ids."""
    background = rng.uniform(60, 195, 3)
    y, x = np.indices((size, size), np.float32).reshape(2, -1)
    canvas = _texture(rng, x, y, background, contrast=10).reshape(size, size, 3)
    negative = rng.random() < _NEGATIVE_SHARE
    shapes = [] if negative else [_place(rng, size) for _ in range(rng.integers(2, 4))]
    hidden = np.zeros((size, size), np.bool_)
    kept = []
    for kind, outline in shapes:  # from front to back
        mask = _fill(outline, size)
        if kind == _RING:
            centre = outline.mean(axis=0)
            mask &= ~_fill(centre + (outline - centre) * _HOLE, size)
        visible = mask & ~hidden
        if visible.sum() < max(1, (1 - _MOST_HIDDEN) * mask.sum()):
            continue
        whole = bool((visible == mask).all())
        hidden |= mask
        y, x = (axis.astype(np.float32) for axis in np.nonzero(visible))
        canvas[visible] = _texture(rng, x, y, _contrasting(rng, background), contrast=25)
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
        segmentation = {"size": list(visible.shape), "counts": _runs(visible)}
    else:
        segmentation = {"size": list(visible.shape), "counts": rle["counts"].decode("ascii")}
    return {
        "category_id": kind + 1,
        "bbox": coco_mask.toBbox(rle).tolist(),
        "area": int(visible.sum()),
        "iscrowd": 0,
        "segmentation": segmentation,
    }


def _runs(mask: Mask) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate(([0], mask.ravel(order="F").astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(flat))
    return [int(run) for run in np.diff(np.concatenate(([0], edges, [mask.size])))]


def _fill(outline: Points, size: int) -> Mask:
    """Pixels of a polygon, as pycocotools fills it, so that polygon and bitmap agree."""
    rles = coco_mask.frPyObjects([outline.ravel().tolist()], size, size)
    return coco_mask.decode(rles[0]).astype(np.bool_)


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


def _contrasting(rng: np.random.Generator, background: NDArray[np.float64]) -> NDArray[np.float64]:
    """A colour that is at least 130 from the background, of a cube of side 255."""
    while True:
        colour = rng.uniform(10, 245, 3)
        if np.linalg.norm(colour - background) > 130:
            return colour


def _texture(
    rng: np.random.Generator, x: Coordinates, y: Coordinates, colour: NDArray[np.float64], contrast: float
) -> NDArray[np.float32]:
    """(n, 3) of one colour whose brightness follows a pattern of +- contrast, at n pixels."""
    kind = rng.integers(5)
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    period = rng.uniform(5, 14)
    grain = rng.uniform(-1, 1, (32, 32))
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    across = y * np.float32(np.cos(angle)) - x * np.float32(np.sin(angle))
    wave = np.float32(2 * np.pi / period)
    if kind == 0:
        pattern = np.zeros_like(x)
    elif kind == 1:  # stripes
        pattern = np.sign(np.sin(along * wave + np.float32(phase)))
    elif kind == 2:  # checks
        pattern = np.sign(np.sin(along * wave) * np.sin(across * wave))
    elif kind == 3:  # a slow gradient
        pattern = np.sin(along * np.float32(np.pi / 128) + np.float32(phase))
    else:  # grains of 4 x 4 pixels
        pattern = grain[y.astype(np.int64) // 4 % 32, x.astype(np.int64) // 4 % 32].astype(np.float32)
    strength = np.float32(contrast * rng.uniform(0.5, 1))
    return colour.astype(np.float32) + strength * pattern[:, None]
