"""Drawing of embedded data sets: outlines to pixels, colours, textures, and COCO's run lengths."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

Points = NDArray[np.float64]
Mask = NDArray[np.bool_]
Coordinates = NDArray[np.float32]
Drawn = tuple[NDArray[np.uint8], list[dict[str, Any]]]  # (h, w, 3), and COCO annotations without ids


def write_split(
    folder: Path,
    annotations: Path,
    draw: Callable[[np.random.Generator], Drawn],
    seed: np.random.SeedSequence,
    count: int,
    categories: Sequence[dict[str, Any]],
) -> None:
    """Write `count` images as PNG into a folder, and their annotations as COCO JSON.

    Image k is drawn from the k-th child of the seed, so that more images leave the first ones as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    images: list[dict[str, Any]] = []
    entries: list[dict[str, Any]] = []
    for image_id, child in enumerate(seed.spawn(count), start=1):
        pixels, objects = draw(np.random.default_rng(child))
        name = f"{image_id:05d}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        height, width = pixels.shape[:2]
        images.append({"id": image_id, "file_name": name, "width": width, "height": height})
        for entry in objects:
            entries.append({"id": len(entries) + 1, "image_id": image_id, **entry})
    tree = {"images": images, "annotations": entries, "categories": list(categories)}
    annotations.write_text(json.dumps(tree), encoding="utf-8")


def fill(outline: Points, size: int) -> Mask:
    """Pixels of a polygon, as pycocotools fills it, so that polygon and bitmap agree."""
    rles = coco_mask.frPyObjects([outline.ravel().tolist()], size, size)
    return coco_mask.decode(rles[0]).astype(np.bool_)


def runs(mask: Mask) -> list[int]:
    """Lengths of runs of 0, 1, 0, ... down the columns."""
    flat = np.concatenate(([0], mask.ravel(order="F").astype(np.int8), [0]))
    edges = np.flatnonzero(np.diff(flat))
    return [int(run) for run in np.diff(np.concatenate(([0], edges, [mask.size])))]


def contrasting(rng: np.random.Generator, background: NDArray[np.float64]) -> NDArray[np.float64]:
    """A colour that is at least 130 from the background, of a cube of side 255."""
    while True:
        colour = rng.uniform(10, 245, 3)
        if np.linalg.norm(colour - background) > 130:
            return colour


def texture(
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
