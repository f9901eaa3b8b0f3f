"""Images whose objects have each a colour of its own, so that pixels tell where an object really is."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as coco_mask

from fastmrcnn.data.coco import CocoDataset
from fastmrcnn.data.keypoints import KeypointSchema
from fastmrcnn.data.records import ImageRecord, ObjectRecord
from fastmrcnn.structures import Batch

BACKGROUND = (128, 128, 128)
FILL = (70, 70, 70)
COLOURS = [c for c in itertools.product((0, 128, 255), repeat=3) if len(set(c)) > 1]
PER_IMAGE = 3
FINE = 3  # odd: the middle is one of them; places that are looked at along a side of a pixel
TOLERANCE = 40  # in each channel: what interpolation leaves is nearer to the middle


def coloured(
    folder: Path, images: int = 4, size: tuple[int, int] = (60, 80), keypoints: bool = False
) -> CocoDataset:
    """A square, a ring (by RLE) and a triangle in each image; class and colour count through the set.

    Keypoints are `left`, on a white spot, and `right`, on a black one, in the middle of the square alone.
    """
    height, width = size
    records = []
    for number in range(images):
        rng = np.random.default_rng(number)
        pixels = np.full((height, width, 3), BACKGROUND, np.uint8)
        objects = []
        for place in range(PER_IMAGE):
            index = number * PER_IMAGE + place
            x, y = 3 + place * width // 3 + int(rng.integers(4)), 4 + int(rng.integers(height // 3))
            w, h = width // 4, height // 2
            corners = [(x, y), (x + w, y), (x + w, y + h), (x, y + h)]
            if place == 2:
                corners = [(x, y + h), (x + w // 2, y), (x + w, y + h)]
            polygon = [float(value) for corner in corners for value in corner]
            mask = coco_mask.decode(coco_mask.merge(coco_mask.frPyObjects([polygon], height, width))) > 0
            shape: Any = [np.array(polygon)]
            if place == 1:
                mask[y + h // 4 : y + h // 2, x + w // 4 : x + w // 2] = False
                rle = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
                shape = {"size": list(size), "counts": rle["counts"].decode()}
            pixels[mask] = COLOURS[index]
            points = None
            if keypoints and place == 0:
                left, right, level = x + w // 4, x + 3 * w // 4, y + h // 2
                pixels[level - 3 : level + 3, left - 3 : left + 3] = 255
                pixels[level - 3 : level + 3, right - 3 : right + 3] = 0
                points = np.array([[left, level, 2], [right, level, 2]], np.float32)
            box = (float(x), float(y), float(x + w), float(y + h))
            objects.append(ObjectRecord(index + 1, index, box, False, shape, float(mask.sum()), points))
        path = folder / f"{number}.png"
        Image.fromarray(pixels).save(path)
        records.append(ImageRecord(number + 1, path, path.name, width, height, objects, folder / "set.json"))
    names = [f"class {i}" for i in range(images * PER_IMAGE)]
    schema = KeypointSchema(["left", "right"], [], [1, 0]) if keypoints else None
    ids = list(range(1, len(names) + 1))
    return CocoDataset(records, names, ids, folder / "set.json", keypoints=schema)


def check_agreement(batch: Batch, row: int) -> int:
    """Assert that the masks and boxes of an image of a batch lie on the pixels; the number of its objects."""
    targets = batch.targets
    assert targets is not None
    height, width = batch.sizes[row].tolist()
    pixels = batch.pixels[row, :, :height, :width].permute(1, 2, 0).numpy().astype(int)
    y, x = (np.mgrid[: height * FINE, : width * FINE] + 0.5) / FINE
    at = np.stack([x.ravel(), y.ravel(), np.ones(x.size)])
    slots = np.flatnonzero(targets.valid[row].numpy())
    by_class: dict[int, NDArray[np.bool_]] = {}
    for slot in slots:
        inside = mask_of(batch, row, slot, at).reshape(height * FINE, width * FINE)
        # polygons and their bitmaps differ by half a pixel of the annotation
        step = np.sqrt(abs(np.linalg.det(object_map(batch, row, slot)[:, :2])))
        box = targets.boxes[row, slot].numpy()
        np.testing.assert_allclose(box, extent(inside) / FINE, atol=2 / FINE + 1 / step)
        inside = inside[FINE // 2 :: FINE, FINE // 2 :: FINE]
        index = int(targets.classes[row, slot])
        border = 2 + int(np.ceil(2 / step))  # where interpolation mixes colours
        missing = ~near(pixels, index) & ~spread(~inside, border)
        assert not missing.any(), f"class {index}: {missing.sum()} pixels of its mask have another colour"
        by_class[index] = by_class.get(index, np.zeros_like(inside)) | inside
    for index in range(len(COLOURS)):
        mask = by_class.get(index)
        wrong = near(pixels, index) & ~spread(np.zeros((height, width), bool) if mask is None else mask, 3)
        # an object of less than a pixel's width is none any more
        few = 6 if mask is not None else max(height, width) // 4
        assert wrong.sum() <= few, f"class {index}: {wrong.sum()} pixels of its colour are not in its mask"
    return len(slots)


def near(pixels: NDArray[np.int64], index: int) -> NDArray[np.bool_]:
    """Which pixels have the colour of a class."""
    return (np.abs(pixels - COLOURS[index]) < TOLERANCE).all(axis=2)


def object_map(batch: Batch, row: int, slot: int) -> NDArray[np.float64]:
    """(2, 3), from pixels of the sample to those of the object's annotation."""
    assert batch.targets is not None
    affine = batch.targets.masks.to_annotation
    return (affine[row] if affine.dim() == 3 else affine[row, slot]).double().numpy()


def mask_of(batch: Batch, row: int, slot: int, at: NDArray[np.float64]) -> NDArray[np.bool_]:
    """Whether places (3, n), columns (x, y, 1), are in an object's bitmap."""
    assert batch.targets is not None
    masks = batch.targets.masks
    left, top, w, h = masks.window[row, slot].tolist()
    start = int(masks.offset[row, slot])
    crop = masks.buffer[start : start + w * h].reshape(h, w).numpy() > 0
    column, line = np.floor(object_map(batch, row, slot) @ at).astype(int) - np.array([[left], [top]])
    within = (column >= 0) & (column < w) & (line >= 0) & (line < h)
    return within & crop[line.clip(0, h - 1), column.clip(0, w - 1)]


def spread(mask: NDArray[np.bool_], by: int) -> NDArray[np.bool_]:
    """The mask and what lies within `by` pixels of it, diagonally too."""
    for axis in (0, 1):
        margin = [(by, by) if axis == each else (0, 0) for each in (0, 1)]
        windows = np.lib.stride_tricks.sliding_window_view(np.pad(mask, margin), 2 * by + 1, axis)
        mask = windows.any(axis=-1)
    return mask


def extent(mask: NDArray[np.bool_]) -> NDArray[np.float64]:
    """xyxy of the pixels that are set."""
    y, x = np.nonzero(mask)
    return np.array([x.min(), y.min(), x.max() + 1, y.max() + 1], np.float64)
