"""The tables of packed bitmaps that mask targets are cut from, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Bitmaps(NamedTuple):
    """The ground truth of N images with G slots each."""

    buffer: Tensor  # (B,) uint8
    offset: Tensor  # (N, G) integer
    window: Tensor  # (N, G, 4) integer x, y, width, height
    to_annotation: Tensor  # (N, 2, 3), or of each object (N, G, 2, 3)
    size: Tensor  # (N, 2) height, width of the annotated image, or of each object's (N, G, 2)
    image_sizes: Tensor  # (N, 2) height, width of the image within the padded input


class Sampling(NamedTuple):
    """Where the ground truth is read, and what is made of it."""

    image_shape: tuple[int, int]  # height, width of the padded input
    resolution: int
    sampling_ratio: int  # 0: adaptive
    aligned: bool
    bitmap: bool


def slot_of(image: Tensor, matched: Tensor, images: int, objects: int) -> Tensor:
    """(F,) int64, object `matched` of `image` as a number through all slots; -1 if there is none such."""
    image, matched = image.long(), matched.long()
    exists = (image >= 0) & (image < images) & (matched >= 0) & (matched < objects)
    return torch.where(exists, image * objects + matched, -1)


def one_object_each(image: Tensor, matched: Tensor, bitmaps: Bitmaps) -> tuple[Tensor, Tensor, Bitmaps]:
    """The same ground truth with one map for each image, as kernels read it: where objects have maps of
    their own, of N * G images with one object each."""
    if bitmaps.to_annotation.dim() == 3:
        return image, matched, bitmaps
    images, objects = bitmaps.offset.shape
    row = slot_of(image, matched, images, objects)
    flat = Bitmaps(
        bitmaps.buffer,
        bitmaps.offset.reshape(-1, 1),
        bitmaps.window.reshape(-1, 1, 4),
        bitmaps.to_annotation.reshape(-1, 2, 3),
        bitmaps.size.reshape(-1, 2),
        bitmaps.image_sizes.repeat_interleave(objects, dim=0, output_size=images * objects),
    )
    return row, torch.zeros_like(row), flat


BITMAPS_SCHEMA = (
    "Tensor buffer, Tensor offset, Tensor window, Tensor to_annotation, Tensor size, Tensor image_sizes, "
    "SymInt[] image_shape, SymInt resolution, SymInt sampling_ratio, bool aligned, bool bitmap"
)
"""As operators take `*bitmaps, *how`."""


def from_arguments(arguments: Sequence[Any]) -> tuple[Bitmaps, Sampling]:
    """Back from an operator's arguments."""
    *tables, image_shape, resolution, sampling_ratio, aligned, bitmap = arguments
    return Bitmaps(*tables), Sampling(tuple(image_shape), resolution, sampling_ratio, aligned, bitmap)
