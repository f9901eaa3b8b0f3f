"""The tables of packed bitmaps that mask targets are cut from, and how they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Bitmaps(NamedTuple):
    """The ground truth of N images with G slots each."""

    buffer: Tensor  # (B,) uint8
    offset: Tensor  # (N, G) integer
    window: Tensor  # (N, G, 4) integer x, y, width, height
    to_annotation: Tensor  # (N, 2, 3)
    size: Tensor  # (N, 2) height, width of the annotated image
    image_sizes: Tensor  # (N, 2) height, width of the image within the padded input


class Sampling(NamedTuple):
    """Where the ground truth is read, and what is made of it."""

    image_shape: tuple[int, int]  # height, width of the padded input
    resolution: int
    sampling_ratio: int  # 0: adaptive
    aligned: bool
    bitmap: bool


BITMAPS_SCHEMA = (
    "Tensor buffer, Tensor offset, Tensor window, Tensor to_annotation, Tensor size, Tensor image_sizes, "
    "SymInt[] image_shape, SymInt resolution, SymInt sampling_ratio, bool aligned, bool bitmap"
)
"""As operators take `*bitmaps, *how`."""


def from_arguments(arguments: Sequence[Any]) -> tuple[Bitmaps, Sampling]:
    """Back from an operator's arguments."""
    *tables, image_shape, resolution, sampling_ratio, aligned, bitmap = arguments
    return Bitmaps(*tables), Sampling(tuple(image_shape), resolution, sampling_ratio, aligned, bitmap)
