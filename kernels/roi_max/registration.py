"""Registration of the operator that takes the largest value of each bin, and of its gradient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..common.library import runs_triton
from ..common.pooling import (
    MAPS_SCHEMA,
    POOLING_SCHEMA,
    Maps,
    Pooling,
    empty_maps,
    empty_pooled,
    is_channels_last,
    memory_format,
)
from ..common.roi_checks import Inputs
from . import cpu
from .points import MOST_SAMPLES


def largest(inputs: Inputs, kind: str, how: Pooling) -> Tensor:
    """(R, C, oh, ow): see `cpu.multilevel_roi_max`."""
    for feature in inputs.features:
        if max(feature.shape[2:]) > MOST_SAMPLES:
            raise ValueError(f"maps must be at most {MOST_SAMPLES} pixels wide, got {tuple(feature.shape)}")
    if how.sampling_ratio > MOST_SAMPLES:
        raise ValueError(f"sampling_ratio must be at most {MOST_SAMPLES}, got {how.sampling_ratio}")
    out, _ = _roi_max(*inputs, kind, *how.arguments)
    return out


@torch.library.custom_op(
    add_op_namespace_prefix("roi_max"),
    mutates_args=(),
    schema="(Tensor[] features, Tensor boxes, Tensor? batch_index, Tensor? valid, str kind, "
    f"{POOLING_SCHEMA}) -> (Tensor, Tensor)",
)
def _roi_max(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    kind: str,
    *arguments: Any,
) -> tuple[Tensor, Tensor]:
    how = Pooling.of(arguments)
    if runs_triton(boxes):
        from . import kernel

        return kernel.multilevel_roi_max(list(features), boxes, batch_index, valid, kind, how)
    form = memory_format(is_channels_last(features[0]))
    out, winner = cpu.multilevel_roi_max(list(features), boxes, batch_index, valid, kind, how)
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
    rois = boxes.shape[0]
    return empty_pooled(features, rois, output_size), empty_pooled(features, rois, output_size, torch.int32)


@torch.library.custom_op(
    add_op_namespace_prefix("roi_max_backward"),
    mutates_args=(),
    schema="(Tensor grad, Tensor winner, Tensor boxes, Tensor? batch_index, Tensor? valid, "
    f"{MAPS_SCHEMA}, str kind, {POOLING_SCHEMA}) -> Tensor[]",
)
def _roi_max_backward(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    maps, kind, how = Maps(*arguments[:4]), arguments[4], Pooling.of(arguments[5:])
    where = (maps.num_images, maps.sizes)
    if runs_triton(boxes):
        from . import kernel

        rois = (boxes, batch_index, valid)
        return kernel.multilevel_roi_max_backward(grad, winner, *rois, *where, maps.channels_last, kind, how)
    grads = cpu.multilevel_roi_max_backward(grad, winner, boxes, batch_index, *where, kind, how)
    return [part.clone(memory_format=memory_format(maps.channels_last)) for part in grads]


@_roi_max_backward.register_fake
def _(
    grad: Tensor,
    winner: Tensor,
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    maps = Maps(*arguments[:4])
    return empty_maps(grad, maps.num_images, maps.sizes, maps.channels_last)


def _context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, boxes, batch_index, valid, *how = inputs
    ctx.save_for_backward(output[1], boxes, batch_index, valid)
    ctx.maps = Maps.of(features)
    ctx.how = how


def _gradient(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Any, ...]:
    grads = _roi_max_backward(grad, *ctx.saved_tensors, *ctx.maps, *ctx.how)
    return grads, None, None, None, *(None for _ in ctx.how)


_roi_max.register_autograd(_gradient, setup_context=_context)
