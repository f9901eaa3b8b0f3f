"""How RoIs are pooled, and the shapes and layouts of what goes in and comes out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Pooling(NamedTuple):
    """How to pool: what is not a tensor."""

    output_size: tuple[int, int]
    spatial_scales: list[float]  # of each level
    sampling_ratio: int  # samples per bin and axis; 0 or less: ceil(side of the bin)
    aligned: bool
    canonical_size: float
    canonical_level: int
    k_min: int

    @classmethod
    def of(cls, arguments: Sequence[Any]) -> Pooling:
        """Back from an operator's arguments."""
        output_size, spatial_scales, *rest = arguments
        return cls(tuple(output_size), list(spatial_scales), *rest)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """As operators take it, by POOLING_SCHEMA: those have lists, no tuples."""
        return list(self.output_size), *self[1:]


class Asked(NamedTuple):
    """RoIs, and how to pool them."""

    boxes: Tensor  # (R, 4) xyxy in input pixels
    batch_index: Tensor | None  # (R,) image of each, of any dtype; None: each image has R / N boxes in turn
    valid: Tensor | None  # (R,) bool; None: all
    how: Pooling


POOLING_SCHEMA = (
    "SymInt[] output_size, float[] spatial_scales, SymInt sampling_ratio, bool aligned, "
    "float canonical_size, SymInt canonical_level, SymInt k_min"
)


class Maps(NamedTuple):
    """The maps of a pyramid, all but their values, as the operators for gradients take them."""

    num_images: int
    heights: Sequence[int]  # of each level
    widths: Sequence[int]
    channels_last: bool

    @classmethod
    def of(cls, features: Sequence[Tensor]) -> Maps:
        first = features[0]
        heights, widths = [f.shape[2] for f in features], [f.shape[3] for f in features]
        return cls(first.shape[0], heights, widths, is_channels_last(first))

    @property
    def sizes(self) -> list[tuple[int, int]]:
        return list(zip(self.heights, self.widths, strict=True))


MAPS_SCHEMA = "SymInt num_images, SymInt[] heights, SymInt[] widths, bool channels_last"


def is_channels_last(feature: Tensor) -> bool:
    return not feature.is_contiguous() and feature.is_contiguous(memory_format=torch.channels_last)


def memory_format(channels_last: bool) -> torch.memory_format:
    return torch.channels_last if channels_last else torch.contiguous_format


def empty_pooled(
    features: Sequence[Tensor], rois: int, output_size: Sequence[int], dtype: torch.dtype | None = None
) -> Tensor:
    """(R, C, oh, ow), channels_last if the first map is; the dtype is that of the maps unless given."""
    first = features[0]
    return torch.empty(
        (rois, first.shape[1], *output_size),
        dtype=dtype or first.dtype,
        device=first.device,
        memory_format=memory_format(is_channels_last(first)),
    )


def empty_maps(
    grad: Tensor, num_images: int, sizes: Sequence[tuple[int, int]], channels_last: bool
) -> list[Tensor]:
    """Of each level, (N, C, Hl, Wl) for gradients of what was pooled to `grad`, (R, C, oh, ow)."""
    return [
        torch.empty(
            (num_images, grad.shape[1], *size),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=memory_format(channels_last),
        )
        for size in sizes
    ]
