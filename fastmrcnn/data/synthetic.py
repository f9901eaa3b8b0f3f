"""Batches of noise with elliptic objects: something to measure with that needs no data set."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastmrcnn.data.buckets import MULTIPLE
from fastmrcnn.data.collate import MIN_MASK_BYTES, Objects, Sample, collate
from fastmrcnn.data.polygons import ImagePolygons
from fastmrcnn.data.transforms import Size
from fastmrcnn.structures import Batch

SMALLEST, LARGEST = 16.0, 800.0  # sides of objects in pixels, as in bench/workload.py
VERTICES = 32  # of an ellipse's polygon


def synthetic_batch(
    images: int,
    shape: Size,
    objects: int = 15,
    num_classes: int = 80,
    seed: int = 0,
    *,
    polygons: bool = False,
) -> Batch:
    """Images of uint8 noise, each with so many elliptic objects.

    The sides of the objects are log-uniform from 16 pixels to 800, or to the image's side if that is less.

    Args:
        shape: height and width of the images, in pixels; the batch is padded to multiples of 32.
        polygons: give the objects polygons too, of 32 vertices, for model.mask_head.target=polygon.
    Returns:
        A batch on the CPU, its pixels channels_last, without keypoints and proposals.
    Raises:
        ValueError: for an image too small to hold an object, for fewer than one image or class, or for a
            negative number of objects.
    """
    return synthetic_batches([seed], images, shape, objects, num_classes, polygons=polygons)[0]


def synthetic_batches(
    seeds: Sequence[int],
    images: int,
    shape: Size,
    objects: int = 15,
    num_classes: int = 80,
    *,
    polygons: bool = False,
) -> list[Batch]:
    """A batch for each seed, as `synthetic_batch` makes it; all tensors are of equal shapes."""
    if images < 1 or num_classes < 1 or objects < 0:
        raise ValueError(
            "images and classes must be at least 1 and objects at least 0, "
            f"got {images} images with {objects} objects of {num_classes} classes"
        )
    if min(shape) < SMALLEST:
        raise ValueError(f"shape must be at least {SMALLEST:g} pixels each way, got {shape[0]}x{shape[1]}")
    bucket = (math.ceil(shape[0] / MULTIPLE) * MULTIPLE, math.ceil(shape[1] / MULTIPLE) * MULTIPLE)
    drawn = []
    for seed in seeds:
        random = np.random.default_rng(seed)
        drawn.append([_sample(random, shape, objects, num_classes, polygons) for _ in range(images)])
    crops = [sum(len(sample.objects.crops) for sample in samples if sample.objects) for samples in drawn]
    most = max([MIN_MASK_BYTES, *crops])
    return [collate(samples, bucket, min_mask_bytes=most) for samples in drawn]


def full_masks(batch: Batch) -> list[Tensor]:
    """The bitmaps of a synthetic batch in whole images, (n, H, W) uint8 each, H and W without padding."""
    assert batch.targets is not None
    masks = batch.targets.masks
    found = []
    for image, (height, width) in enumerate(batch.sizes.tolist()):
        count = int(batch.targets.valid[image].sum())
        whole = torch.zeros((count, height, width), dtype=torch.uint8)
        for slot in range(count):
            x, y, w, h = masks.window[image, slot].tolist()
            start = int(masks.offset[image, slot])
            whole[slot, y : y + h, x : x + w] = masks.buffer[start : start + w * h].view(h, w)
        found.append(whole)
    return found


def _sample(
    random: np.random.Generator, shape: Size, objects: int, num_classes: int, polygons: bool
) -> Sample:
    extent = np.array([shape[1], shape[0]], np.float64)
    sides = SMALLEST * (np.minimum(extent, LARGEST) / SMALLEST) ** random.random((objects, 2))
    sides = sides.round()
    corners = (random.random((objects, 2)) * (extent - sides)).round()
    boxes = np.concatenate([corners, corners + sides], axis=1).astype(np.float32)
    windows = np.concatenate([corners, sides], axis=1).astype(np.int32)
    crops = [_ellipse(width, height).ravel() for width, height in windows[:, 2:].tolist()]
    identity = np.eye(2, 3)
    own = Objects(
        boxes=boxes,
        classes=random.integers(num_classes, size=objects),
        crowd=np.zeros(objects, np.bool_),
        crops=np.concatenate([*crops, np.zeros(0, np.uint8)]),
        windows=windows,
        polygons=_outlines(corners, sides) if polygons else None,
    )
    return Sample(
        pixels=random.integers(256, size=(*shape, 3), dtype=np.uint8),
        to_annotation=identity,
        annotated=shape,
        boxes=boxes,
        objects=own,
        from_annotation=identity,
    )


def _ellipse(width: int, height: int) -> NDArray[np.uint8]:
    """The ellipse that touches all sides of a box: pixels whose centre lies within."""
    y = (np.arange(height) + 0.5) / height * 2 - 1
    x = (np.arange(width) + 0.5) / width * 2 - 1
    return (y[:, None] ** 2 + x**2 <= 1).astype(np.uint8)


def _outlines(corners: NDArray[np.float64], sides: NDArray[np.float64]) -> ImagePolygons:
    angle = np.arange(VERTICES) * 2 * np.pi / VERTICES
    circle = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    vertices = (corners + sides / 2)[:, None] + circle * (sides / 2)[:, None]
    count = len(corners)
    return ImagePolygons(
        vertices=vertices.reshape(-1, 2),
        lengths=np.full(count, VERTICES, np.int32),
        parts=np.ones(count, np.int32),
        longest=VERTICES if count else 0,
    )
