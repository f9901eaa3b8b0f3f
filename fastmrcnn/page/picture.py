"""The picture of what was found, as large as a screen needs it or in full."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fastmrcnn.detection.draw import draw_objects, object_labels
from fastmrcnn.detection.objects import Objects
from fastmrcnn.page.found import Found, subset
from fastmrcnn.weights.card import ModelCard

LONG_SIDE = 1400  # of what is shown
MASKS, BOXES, NAMES, NUMBERS, POINTS = "Masks", "Boxes", "Names and scores", "Numbers", "Keypoints"


def draw_found(
    found: Found, places: NDArray[np.int64], card: ModelCard, parts: Collection[str], long_side: int | None
) -> NDArray[np.uint8]:
    """The image with the objects at `places`.

    Args:
        parts: which of MASKS, BOXES, NAMES, NUMBERS and POINTS are drawn.
        long_side: to which a larger image is reduced, in pixels; None: it is not.
    Returns:
        (h', w', 3) uint8 RGB; small images are enlarged by a whole factor.
    """
    pixels, objects = reduced(found.pixels, subset(found.objects, places), long_side)
    if MASKS not in parts:
        objects = replace(objects, probabilities=None)
    if POINTS not in parts:
        objects = replace(objects, keypoints=None)
    numbers = [str(place + 1) if NUMBERS in parts else "" for place in places.tolist()]
    names = object_labels(objects, card.class_names) if NAMES in parts else [""] * len(objects)
    return draw_objects(
        pixels,
        objects,
        card.class_names,
        () if card.keypoints is None else card.keypoints.skeleton,
        boxes=BOXES in parts,
        labels=[f"{number} {name}".strip() for number, name in zip(numbers, names, strict=True)],
        threshold=card.config.model.mask_head.threshold,
    )


def reduced(
    pixels: NDArray[np.uint8], objects: Objects, long_side: int | None
) -> tuple[NDArray[np.uint8], Objects]:
    """Image and objects with a long side of `long_side` pixels at most."""
    height, width = pixels.shape[:2]
    if long_side is None or max(height, width) <= long_side:
        return pixels, objects
    factor = long_side / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    scale = np.array([size[0] / width, size[1] / height], np.float32)
    points = objects.keypoints
    smaller = replace(
        objects,
        height=size[1],
        width=size[0],
        boxes=objects.boxes * np.tile(scale, 2),
        keypoints=None if points is None else points * np.append(scale, np.float32(1)),
    )
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS)), smaller
