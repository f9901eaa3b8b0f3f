"""Registration of the operator that takes the largest value of each bin, and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._library import NAMESPACE, runs_triton
from ..roi_align.checks import Inputs, pair
from ..roi_align.rois import Pooling, is_channels_last, memory_format
from . import reference
from .points import MOST_SAMPLES


def largest(inputs: Inputs, kind: str, how: Pooling) -> Tensor:
    """(R, C, oh, ow): see `reference.multilevel_roi_max`."""
    for feature in inputs.features:
        if max(feature.shape[2:]) > MOST_SAMPLES:
            raise ValueError(f"maps must be at most {MOST_SAMPLES} pixels wide, got {tuple(feature.shape)}")
    if how.sampling_ratio > MOST_SAMPLES:
        raise ValueError(f"sampling_ratio must be at most {MOST_SAMPLES}, got {how.sampling_ratio}")
    out, _ = _roi_max(*inputs, kind, list(how.output_size), *how[1:])
    return out


@torch.library.custom_op(f"{NAMESPACE}::roi_max", mutates_args=())
def _roi_max(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    k_min: int,
) -> tuple[Tensor, Tensor]:
    how = Pooling(
        pair(output_size),
        list(spatial_scales),
        sampling_ratio,
        aligned,
        canonical_size,
        canonical_level,
        k_min,
    )
    if runs_triton(boxes):
        from . import kernel

        return kernel.multilevel_roi_max(list(features), boxes, batch_index, valid, kind, how)
    form = memory_format(is_channels_last(features[0]))
    out, winner = reference.multilevel_roi_max(list(features), boxes, batch_index, valid, kind, how)
    return out.contiguous(memory_format=form), winner.contiguous(memory_format=form)


@_roi_max.register_fake
def _(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    output_size: Sequence[int],
    *how: Any,
) -> tuple[Tensor, Tensor]:
    first = features[0]
    shape = (boxes.shape[0], first.shape[1], *output_size)
    form = memory_format(is_channels_last(first))
    out, winner = (
        torch.empty(shape, dtype=dtype, device=first.device, memory_format=form)
        for dtype in (first.dtype, torch.int32)
    )
    return out, winner


@torch.library.custom_op(f"{NAMESPACE}::roi_max_backward", mutates_args=())
def _roi_max_backward(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    kind: str,
    output_size: Sequence[int],
    spatial_scales: Sequence[float],
    sampling_ratio: int,
    aligned: bool,
    canonical_size: float,
    canonical_level: int,
    k_min: int,
) -> list[Tensor]:
    how = Pooling(
        pair(output_size),
        list(spatial_scales),
        sampling_ratio,
        aligned,
        canonical_size,
        canonical_level,
        k_min,
    )
    sizes = list(zip(heights, widths, strict=True))
    if runs_triton(boxes):
        from . import kernel

        return kernel.multilevel_roi_max_backward(
            grad, winner, boxes, batch_index, valid, num_images, sizes, channels_last, kind, how
        )
    grads = reference.multilevel_roi_max_backward(
        grad, winner, boxes, batch_index, num_images, sizes, kind, how
    )
    return [part.clone(memory_format=memory_format(channels_last)) for part in grads]


@_roi_max_backward.register_fake
def _(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    num_images: int,
    heights: Sequence[int],
    widths: Sequence[int],
    channels_last: bool,
    *how: Any,
) -> list[Tensor]:
    return [
        torch.empty(
            (num_images, grad.shape[1], height, width),
            dtype=grad.dtype,
            device=grad.device,
            memory_format=memory_format(channels_last),
        )
        for height, width in zip(heights, widths, strict=True)
    ]


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, batch_index, valid, *how = inputs
    ctx.save_for_backward(output[1], boxes, batch_index, valid)
    ctx.maps = (
        features[0].shape[0],
        [f.shape[2] for f in features],
        [f.shape[3] for f in features],
        is_channels_last(features[0]),
    )
    ctx.how = how


def _gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    grads = _roi_max_backward(grad, *ctx.saved_tensors, *ctx.maps, *ctx.how)
    return grads, None, None, None, *(None for _ in ctx.how)


_roi_max.register_autograd(_gradient, setup_context=_context)
