"""RoIAlign of several sets of RoIs from the same maps: the public function and its registration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..common.pooling import MAPS_SCHEMA, Asked, Maps, Pooling, empty_maps, empty_pooled
from ..common.roi_checks import by_image, check_pyramid, pooling
from .op import gradients, pooled


class RoiSet(NamedTuple):
    """Boxes, and how they are pooled; see `multilevel_roi_align`."""

    boxes: Tensor  # (N, S, 4) floating point xyxy in input pixels, or (R, 4) with batch_index
    output_size: int | Sequence[int]
    valid: Tensor | None = None  # (N, S) or (R,) bool
    batch_index: Tensor | None = None  # (R,)
    sampling_ratio: int = -1


def multilevel_roi_align_sets(
    features: Sequence[Tensor],
    sets: Sequence[RoiSet],
    *,
    spatial_scales: Sequence[float],
    aligned: bool = False,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> list[Tensor]:
    """`multilevel_roi_align` of several sets of RoIs, whose gradients of the maps are made as one.

    A box head and a mask head pool from the same maps. Apart, each writes a gradient of all maps, and a
    third pass adds them; here a pixel gathers from all sets and is written once. So backward begins when
    the gradients of all sets are there.

    Args:
        features, spatial_scales, aligned, canonical_size, canonical_level, k_min: as
            `multilevel_roi_align`, for all sets.
        sets: the RoIs, and of each set its output size and samples.

    Returns:
        Of each set what `multilevel_roi_align` returns.

    Raises:
        ValueError: as `multilevel_roi_align`, or there is no set.
    """
    if not sets:
        raise ValueError("sets must not be empty")
    asked = []
    for boxes, output_size, valid, batch_index, sampling_ratio in sets:
        inputs = check_pyramid(features, boxes, spatial_scales, valid, batch_index)
        how = pooling(
            output_size, spatial_scales, sampling_ratio, aligned, canonical_size, canonical_level, k_min
        )
        asked.append(Asked(inputs.boxes, inputs.batch_index, inputs.valid, how))
    outs = _roi_align_sets(list(features), *_arguments(asked))
    return [by_image(out, one.boxes, one.batch_index) for out, one in zip(outs, sets, strict=True)]


SETS_SCHEMA = (
    "Tensor[] rois, bool[] given, SymInt[] output_sizes, SymInt[] sampling_ratios, float[] spatial_scales, "
    "bool aligned, float canonical_size, SymInt canonical_level, SymInt k_min"
)
"""`rois` has the boxes of all sets, then of one set after the other its batch_index and its valid, as far as
they are `given`. Output sizes are height and width of one set after the other; what follows the ratios is
of all sets."""


def _arguments(asked: Sequence[Asked]) -> tuple[Any, ...]:
    """As operators take them."""
    optional = [tensor for one in asked for tensor in (one.batch_index, one.valid)]
    first = asked[0].how
    return (
        [one.boxes for one in asked] + [tensor for tensor in optional if tensor is not None],
        [tensor is not None for tensor in optional],
        [side for one in asked for side in one.how.output_size],
        [one.how.sampling_ratio for one in asked],
        first.spatial_scales,
        *first[3:],
    )


def _asked(arguments: Sequence[Any]) -> list[Asked]:
    """Back from an operator's arguments."""
    rois, given, sizes, ratios, scales, *levels = arguments
    rest = iter(rois[len(ratios) :])
    optional = [next(rest) if there else None for there in given]
    pairs = zip(optional[::2], optional[1::2], sizes[::2], sizes[1::2], strict=True)
    return [
        Asked(boxes, batch_index, valid, Pooling((height, width), list(scales), ratio, *levels))
        for boxes, ratio, (batch_index, valid, height, width) in zip(rois, ratios, pairs, strict=False)
    ]


@torch.library.custom_op(
    add_op_namespace_prefix("roi_align_sets"),
    mutates_args=(),
    schema=f"(Tensor[] features, {SETS_SCHEMA}) -> Tensor[]",
)
def _roi_align_sets(features: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return [pooled(list(features), one) for one in _asked(arguments)]


@_roi_align_sets.register_fake
def _(features: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return [empty_pooled(features, one.boxes.shape[0], one.how.output_size) for one in _asked(arguments)]


@torch.library.custom_op(
    add_op_namespace_prefix("roi_align_sets_backward"),
    mutates_args=(),
    schema=f"(Tensor[] grads, {MAPS_SCHEMA}, {SETS_SCHEMA}) -> Tensor[]",
)
def _roi_align_sets_backward(grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    return gradients(list(grads), _asked(arguments[4:]), Maps(*arguments[:4]))


@_roi_align_sets_backward.register_fake
def _(grads: Sequence[Tensor], *arguments: Any) -> list[Tensor]:
    maps = Maps(*arguments[:4])
    return empty_maps(grads[0], maps.num_images, maps.sizes, maps.channels_last)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    features, rois, *ctx.how = inputs
    ctx.save_for_backward(*rois)
    ctx.maps = Maps.of(features)


def _forward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    rois = list(ctx.saved_tensors)
    found = _roi_align_sets_backward(grads, *ctx.maps, rois, *ctx.how)
    return found, [None for _ in rois], *(None for _ in ctx.how)


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, _, _, _, _, rois, *ctx.how = inputs
    ctx.save_for_backward(*rois)


def _backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """RoIAlign is linear in the features, so the gradient of its backward is its forward."""
    rois = list(ctx.saved_tensors)
    found = _roi_align_sets(grads, rois, *ctx.how)
    return found, *(None for _ in range(4)), [None for _ in rois], *(None for _ in ctx.how)


_roi_align_sets.register_autograd(_forward_gradient, setup_context=_forward_context)
_roi_align_sets_backward.register_autograd(_backward_gradient, setup_context=_backward_context)
