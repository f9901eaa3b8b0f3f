"""RoIAlign: public functions and their registration."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._ops import add_op_namespace_prefix
from ..common.library import runs_triton
from ..common.pooling import (
    MAPS_SCHEMA,
    POOLING_SCHEMA,
    Asked,
    Maps,
    Pooling,
    empty_maps,
    empty_pooled,
    is_channels_last,
    memory_format,
)
from ..common.roi_checks import by_image, check_features, check_pyramid, check_single, pack, pair, pooling
from . import cpu


def roi_align(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float = 1.0,
    sampling_ratio: int = -1,
    aligned: bool = False,
) -> Tensor:
    """RoIAlign of one feature map, with torchvision.ops.roi_align's signature and numbers.

    Backward is deterministic, and can itself be differentiated with respect to the features. Boxes get
    no gradient. Under autocast the features keep their dtype.

    Args:
        input: (N, C, H, W) fp64, fp32, fp16 or bf16, in any memory format.
        boxes: (R, 5) as (image, x1, y1, x2, y2), or of each image a (Ri, 4) of xyxy; in pixels of the
            input image, floating point. Boxes that are not finite give zeros and no gradient.
        output_size: height and width of the output, or one number for both.
        spatial_scale: pixels of the map per pixel of the image.
        sampling_ratio: samples per bin and axis; 0 or less: ceil(side of the bin).
        aligned: shift by half a pixel, so that pixel (0, 0) is sampled at its centre (detectron2's
            RoIAlignV2). Without it boxes are at least one pixel of the map wide.

    Returns:
        (R, C, oh, ow) in the dtype of the input; channels_last if the input is.

    Raises:
        ValueError: a shape, dtype, device or number is not as above; for CPU tensors outside of
            torch.compile, also an image index out of range, which elsewhere gives zeros.
    """
    inputs = check_single(input, boxes)
    how = pooling(output_size, [spatial_scale], sampling_ratio, aligned, 224.0, 4, 0)
    return _roi_align(*inputs, *how.arguments)


def multilevel_roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    output_size: int | Sequence[int],
    *,
    spatial_scales: Sequence[float],
    valid: Tensor | None = None,
    batch_index: Tensor | None = None,
    sampling_ratio: int = -1,
    aligned: bool = False,
    canonical_size: float = 224.0,
    canonical_level: int = 4,
    k_min: int | None = None,
) -> Tensor:
    """RoIAlign over a feature pyramid, each box from the level that `assign_levels` gives it.

    Backward is deterministic, and can itself be differentiated with respect to the features. Boxes get
    no gradient. Under autocast the features keep their dtype.

    Args:
        features: of each level, finest first, (N, C, Hl, Wl); one dtype, fp64, fp32, fp16 or bf16.
        boxes: (N, S, 4) floating point xyxy in input pixels, or (R, 4) with `batch_index`. Boxes that
            are not finite give zeros and no gradient.
        output_size: height and width of the output, or one number for both.
        spatial_scales: of each level, its pixels per input pixel.
        valid: (N, S) or (R,) bool; slots that are not valid give zeros and no gradient, and take no time.
        batch_index: (R,) image of each box, if boxes are (R, 4).
        sampling_ratio: as in `roi_align`.
        aligned: as in `roi_align`.
        canonical_size: side of a square box, in input pixels, that belongs to `canonical_level`.
        canonical_level: see canonical_size.
        k_min: level of the first map; None: -log2 of its scale.

    Returns:
        (N, S, C, oh, ow), or (R, C, oh, ow), in the dtype of the features; the last three axes are
        channels_last if the maps are.

    Raises:
        ValueError: as `roi_align`.
    """
    inputs = check_pyramid(features, boxes, spatial_scales, valid, batch_index)
    how = pooling(
        output_size, spatial_scales, sampling_ratio, aligned, canonical_size, canonical_level, k_min
    )
    return by_image(_roi_align(*inputs, *how.arguments), boxes, batch_index)


class MultiScaleRoIAlign(nn.Module):
    """RoIAlign over a pyramid, in the form of torchvision.ops.MultiScaleRoIAlign.

    Args:
        featmap_names: keys of the maps to pool from, finest first.
        output_size: height and width of the output, or one number for both.
        sampling_ratio: samples per bin and axis; 0 or less: adaptive.
        canonical_scale: side of a square box, in input pixels, that belongs to canonical_level.
        canonical_level: see canonical_scale.
    """

    def __init__(
        self,
        featmap_names: Sequence[str],
        output_size: int | Sequence[int],
        sampling_ratio: int,
        *,
        canonical_scale: float = 224,
        canonical_level: int = 4,
    ) -> None:
        super().__init__()
        self.featmap_names = list(featmap_names)
        self.output_size = pair(output_size)
        self.sampling_ratio = sampling_ratio
        self.canonical_scale = canonical_scale
        self.canonical_level = canonical_level

    def forward(
        self, x: dict[str, Tensor], boxes: Sequence[Tensor], image_shapes: Sequence[tuple[int, int]]
    ) -> Tensor:
        """Pool every box.

        Args:
            x: maps by name, each (N, C, Hl, Wl).
            boxes: of each image, (Ri, 4) xyxy in input pixels.
            image_shapes: height and width of each image before padding; with the maps' sizes they give
                the scale of each level, rounded to a power of two.

        Returns:
            (R, C, oh, ow), the boxes of the first image first.
        """
        maps = [value for name, value in x.items() if name in self.featmap_names]
        check_features(maps, "x")
        if not image_shapes:
            raise ValueError("image_shapes must not be empty")
        packed, batch_index = pack(boxes, maps[0].shape[0])
        height = max(shape[0] for shape in image_shapes)
        return multilevel_roi_align(
            maps,
            packed,
            self.output_size,
            spatial_scales=[2.0 ** round(math.log2(m.shape[2] / height)) for m in maps],
            batch_index=batch_index,
            sampling_ratio=self.sampling_ratio,
            canonical_size=self.canonical_scale,
            canonical_level=self.canonical_level,
        )

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(featmap_names={self.featmap_names}, "
            f"output_size={self.output_size}, sampling_ratio={self.sampling_ratio})"
        )


@torch.library.custom_op(
    add_op_namespace_prefix("roi_align"),
    mutates_args=(),
    schema="(Tensor[] features, Tensor boxes, Tensor? batch_index, Tensor? valid, "
    f"{POOLING_SCHEMA}) -> Tensor",
)
def _roi_align(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    *arguments: Any,
) -> Tensor:
    return pooled(list(features), Asked(boxes, batch_index, valid, Pooling.of(arguments)))


def pooled(features: list[Tensor], asked: Asked) -> Tensor:
    """(R, C, oh, ow), channels_last if the first map is; see `cpu`."""
    if runs_triton(features[0]):
        from . import kernel

        return kernel.multilevel_roi_align(features, *asked)
    out = cpu.multilevel_roi_align(features, *asked)
    return out.contiguous(memory_format=memory_format(is_channels_last(features[0])))


@_roi_align.register_fake
def _(
    features: Sequence[Tensor],
    boxes: Tensor,
    batch_index: Tensor | None,
    valid: Tensor | None,
    output_size: Sequence[int],
    *how: Any,
) -> Tensor:
    return empty_pooled(features, boxes.shape[0], output_size)


@torch.library.custom_op(
    add_op_namespace_prefix("roi_align_backward"),
    mutates_args=(),
    schema="(Tensor grad, Tensor boxes, Tensor? batch_index, Tensor? valid, "
    f"{MAPS_SCHEMA}, {POOLING_SCHEMA}) -> Tensor[]",
)
def _roi_align_backward(
    grad: Tensor, boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, *arguments: Any
) -> list[Tensor]:
    maps, how = Maps(*arguments[:4]), Pooling.of(arguments[4:])
    return gradients([grad], [Asked(boxes, batch_index, valid, how)], maps)


def gradients(out_grads: list[Tensor], asked: list[Asked], maps: Maps) -> list[Tensor]:
    """Of the maps, of what was pooled in one or several sets of RoIs; see `cpu`."""
    if runs_triton(out_grads[0]):
        from . import kernel

        return kernel.multilevel_roi_align_backward(
            out_grads, asked, maps.num_images, maps.sizes, maps.channels_last
        )
    grads = cpu.multilevel_roi_align_backward(out_grads, asked, maps.num_images, maps.sizes)
    return [part.clone(memory_format=memory_format(maps.channels_last)) for part in grads]


@_roi_align_backward.register_fake
def _(
    grad: Tensor, boxes: Tensor, batch_index: Tensor | None, valid: Tensor | None, *arguments: Any
) -> list[Tensor]:
    maps = Maps(*arguments[:4])
    return empty_maps(grad, maps.num_images, maps.sizes, maps.channels_last)


def _forward_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    features, boxes, batch_index, valid, *how = inputs
    ctx.save_for_backward(boxes, batch_index, valid)
    ctx.maps = Maps.of(features)
    ctx.how = how


def _forward_gradient(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    grads = _roi_align_backward(grad, *ctx.saved_tensors, *ctx.maps, *ctx.how)
    return grads, None, None, None, *(None for _ in ctx.how)


def _backward_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    _, boxes, batch_index, valid, _, _, _, _, *how = inputs
    ctx.save_for_backward(boxes, batch_index, valid)
    ctx.how = how


def _backward_gradient(ctx: Any, grads: list[Tensor]) -> tuple[Any, ...]:
    """RoIAlign is linear in the features, so the gradient of its backward is its forward."""
    grad = _roi_align(grads, *ctx.saved_tensors, *ctx.how)
    return grad, *(None for _ in range(7)), *(None for _ in ctx.how)


_roi_align.register_autograd(_forward_gradient, setup_context=_forward_context)
_roi_align_backward.register_autograd(_backward_gradient, setup_context=_backward_context)
