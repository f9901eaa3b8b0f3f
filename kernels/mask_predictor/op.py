"""The mask predictor of each slot's class alone, and its loss: public functions and their registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._ops import add_op_namespace_prefix
from ..common.bitmaps import BITMAPS_SCHEMA, Bitmaps, Sampling, from_arguments, one_object_each
from ..common.checks import require
from ..common.library import in_full_precision, register, runs_triton, sum_dtype
from ..mask_targets import cpu as mask_targets_cpu
from ..mask_targets import op as mask_targets_op
from . import cpu
from .checks import check_classes, check_loss, check_predictor
from .cpu import FeatureLayout, SlotSums, layout_of


def class_mask_logits(features: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """Logits of the mask of one class for each slot: a 1x1 convolution of which one channel is computed.

    That of K classes would be (F, K, M, M); it is never made. The gradient goes to features, weight and
    bias, and repeats bit for bit.

    Args:
        features: (F, C, M, M) floating point, NCHW or channels_last.
        weight: (K, C) or (K, C, 1, 1) floating point; it may have more bits than features, as under
            autocast. K = 1 is class-agnostic: then classes are not looked at.
        bias: (K,) of weight's dtype; None: no bias.
        classes: (F,) integer in 0..K-1.

    Returns:
        (F, M, M): float64 for float64 features, float32 otherwise, also under autocast.

    Raises:
        ValueError: a shape, dtype or device is not as above; in eager mode on the CPU also if a class is
            out of range. On CUDA and when compiled such a slot gives zeros and no gradient.
    """
    weight, bias = check_predictor(features, weight, bias, classes)
    check_classes(classes, len(weight), None)
    return _class_mask_logits(features, weight, bias, classes)


def class_mask_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    targets: Tensor,
    slot_weight: Tensor,
) -> Tensor:
    """Mask predictor and mask loss in one (Mask R-CNN, arXiv 1703.06870, section 3).

    The numbers are those of `mask_loss(conv1x1(features), classes, targets, slot_weight)`, sums in float32
    (float64 for float64 features), without the logits of other classes. Features are read once: forward
    computes what backward needs of them. Loss and gradients repeat bit for bit.

    Args:
        features: (F, C, M, M) floating point, NCHW or channels_last. Their gradient has their dtype and
            memory format.
        weight: (K, C) or (K, C, 1, 1), as for `class_mask_logits`.
        bias: (K,) of weight's dtype; None: no bias.
        classes: (F,) integer in 0..K-1.
        targets: (F, M, M) bool, integer or floating point, in 0..1. They get no gradient.
        slot_weight: (F,) bool, integer or floating point, at least 0; 1 for real slots. Slots of weight 0
            take no part, whatever stands in them, NaN included.

    Returns:
        Scalar: float64 for float64 features, float32 otherwise, also under autocast.

    Raises:
        ValueError: a shape, dtype or device is not as above; in eager mode on the CPU also if the class of
            a slot with weight is out of range. On CUDA and when compiled such a slot adds nothing to the
            sum and gets no gradient.
    """
    weight, bias = check_predictor(features, weight, bias, classes)
    check_loss(features, targets, slot_weight)
    check_classes(classes, len(weight), slot_weight)
    return _class_mask_loss(features, weight, bias, classes, targets.detach(), slot_weight.detach())[0]


def class_mask_loss_from_bitmaps(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    slot_weight: Tensor,
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    buffer: Tensor,
    offset: Tensor,
    window: Tensor,
    to_annotation: Tensor,
    size: Tensor,
    *,
    image_sizes: Tensor,
    image_shape: tuple[int, int],
    sampling_ratio: int = 2,
    aligned: bool = True,
    bitmap: bool = True,
) -> Tensor:
    """`class_mask_loss` with the targets of `mask_targets`, which are computed on the way and never kept.

    Args:
        features: (F, C, M, M) as for `class_mask_loss`; so are weight, bias, classes and slot_weight.
        boxes: (F, 4) as for `mask_targets`; so is what follows, and M is the resolution.
        bitmap: targets are 0 or 1; false: shares.

    Returns:
        Scalar, as `class_mask_loss`.

    Raises:
        ValueError: as `class_mask_loss` and `mask_targets`, and if the masks are not square.
    """
    weight, bias = check_predictor(features, weight, bias, classes)
    check_loss(features, None, slot_weight)
    check_classes(classes, len(weight), slot_weight)
    require("features", features, ("F", "C", "M", "M"))
    require("boxes", boxes, (len(features), 4), like=("features", features))
    bitmaps = Bitmaps(buffer, offset, window, to_annotation, size, image_sizes)
    mask_targets_op.check(boxes, image, matched, slot_weight, bitmaps)
    image, matched, bitmaps = one_object_each(image, matched, bitmaps)
    shape, side = mask_targets_op.shape_of(image_shape), features.shape[-1]
    how = Sampling(shape, side, max(int(sampling_ratio), 0), aligned, bitmap)
    predictor = (features, weight, bias, classes, slot_weight.detach())
    return _from_bitmaps(*predictor, boxes.detach(), image, matched, *bitmaps, *how)[0]


Kept = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # the loss, and the fields of SlotSums


_class_mask_logits = register(cpu.class_mask_logits)


@_class_mask_logits.register_fake
def _(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    slots, _, height, width = features.shape
    return features.new_empty((slots, height, width), dtype=sum_dtype(features))


_class_mask_logits_backward = register(cpu.class_mask_logits_backward)


@_class_mask_logits_backward.register_fake
def _(grad: Tensor, features: Tensor, weight: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_gradients(grad, weight, layout_of(features))


def _save_logits(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    features, weight, _, classes = inputs
    ctx.save_for_backward(features, weight, classes)


def _logits_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
    return *_class_mask_logits_backward(grad, *ctx.saved_tensors), None


_class_mask_logits.register_autograd(_logits_backward, setup_context=_save_logits)


@torch.library.custom_op(add_op_namespace_prefix("class_mask_loss"), mutates_args=())
def _class_mask_loss(
    features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, targets: Tensor, slot_weight: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    arguments = (features, weight, bias, classes, targets, slot_weight)
    if runs_triton(features):
        from . import kernel

        loss, sums = kernel.class_mask_loss(*arguments)
    else:
        loss, sums = in_full_precision(cpu.class_mask_loss, *arguments)
    return loss, *sums


@torch.library.custom_op(
    add_op_namespace_prefix("class_mask_loss_from_bitmaps"),
    mutates_args=(),
    schema="(Tensor features, Tensor weight, Tensor bias, Tensor classes, Tensor slot_weight, Tensor boxes, "
    f"Tensor image, Tensor matched, {BITMAPS_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def _from_bitmaps(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    slot_weight: Tensor,
    boxes: Tensor,
    image: Tensor,
    matched: Tensor,
    *arguments: Any,
) -> Kept:
    bitmaps, how = from_arguments(arguments)
    if runs_triton(features):
        from . import kernel

        ground_truth = (boxes, image, matched, bitmaps, how)
        loss, sums = kernel.class_mask_loss(features, weight, bias, classes, None, slot_weight, ground_truth)
        return loss, *sums
    rois = (boxes, image, matched, slot_weight)
    targets = in_full_precision(mask_targets_cpu.mask_targets, *rois, bitmaps, how)
    loss, sums = in_full_precision(cpu.class_mask_loss, features, weight, bias, classes, targets, slot_weight)
    return loss, *sums


@_class_mask_loss.register_fake
@_from_bitmaps.register_fake
def _(features: Tensor, *rest: Any) -> Kept:
    slots, channels, height, width = features.shape
    dtype = sum_dtype(features)
    shapes: list[tuple[int, ...]] = [(), (), (slots, height, width), (slots, channels), (slots,)]
    loss, divisor, slope, weight_sums, bias_sums = (
        features.new_empty(shape, dtype=dtype) for shape in shapes
    )
    return loss, divisor, slope, weight_sums, bias_sums


@torch.library.custom_op(add_op_namespace_prefix("class_mask_loss_backward"), mutates_args=())
def _class_mask_loss_backward(
    grad: Tensor,
    divisor: Tensor,
    slope: Tensor,
    weight_sums: Tensor,
    bias_sums: Tensor,
    weight: Tensor,
    classes: Tensor,
    slot_weight: Tensor,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = SlotSums(divisor, slope, weight_sums, bias_sums)
    layout = FeatureLayout(dtype, channels_last)
    if runs_triton(slope):
        from . import kernel

        return kernel.class_mask_loss_backward(grad, sums, weight, classes, slot_weight, layout)
    return cpu.class_mask_loss_backward(grad, sums, weight, classes, slot_weight, layout)


@_class_mask_loss_backward.register_fake
def _(grad: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, slope, _, _, weight, _, _, *layout = rest
    return _empty_gradients(slope, weight, FeatureLayout(*layout))


def _empty_gradients(slope: Tensor, weight: Tensor, layout: FeatureLayout) -> tuple[Tensor, Tensor, Tensor]:
    slots, height, width = slope.shape
    K, channels = weight.shape
    grad_features = layout.empty(slots, channels, height, width, device=slope.device)
    return grad_features, weight.new_empty((K, channels)), weight.new_empty((K,))


def _save_loss(ctx: Any, inputs: tuple[Any, ...], output: Kept) -> None:
    features, weight, _, classes, _, slot_weight = inputs
    _save(ctx, features, weight, classes, slot_weight, output)


def _save_loss_from_bitmaps(ctx: Any, inputs: tuple[Any, ...], output: Kept) -> None:
    features, weight, _, classes, slot_weight, *_ = inputs
    _save(ctx, features, weight, classes, slot_weight, output)


def _save(
    ctx: Any, features: Tensor, weight: Tensor, classes: Tensor, slot_weight: Tensor, output: Kept
) -> None:
    """Not the features: whoever made them may let them go."""
    ctx.layout = layout_of(features)
    ctx.save_for_backward(*output[1:], weight, classes, slot_weight)


def _loss_backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    grads = _class_mask_loss_backward(grad, *ctx.saved_tensors, *ctx.layout)
    return *grads, *(None for _ in ctx.needs_input_grad[len(grads) :])


_class_mask_loss.register_autograd(_loss_backward, setup_context=_save_loss)
_from_bitmaps.register_autograd(_loss_backward, setup_context=_save_loss_from_bitmaps)
