"""The mask predictor of each slot's class alone, and its loss, in Triton.

The work is moving the features. Forward reads them once: while a few pixels with all their channels are in
registers, it computes their logits, the loss, its slope with respect to the logits, and what they add to
the gradient of the weights. So backward reads no feature: it multiplies slopes by weights, and writes the
gradient of the features once. Every sum has a fixed order, so the results repeat bit for bit.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.bitmaps import Bitmaps, Sampling
from ..common.launch import CompileSpec, Launch, plain
from ..mask_loss import kernel as mask_loss_kernel
from ..mask_targets.kernel import example
from . import backward, forward
from .cpu import FeatureLayout, SlotSums, layout_of


def class_mask_logits(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """See `cpu.class_mask_logits`."""
    logits, launch = forward.logits_launch(features, weight, bias, classes)
    if logits.numel():
        launch.run()
    return logits


def class_mask_logits_backward(
    grad: Tensor, features: Tensor, weight: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cpu.class_mask_logits_backward`."""
    parts, launch = backward.sums_launch(grad, features, weight, classes)
    if grad.numel():
        launch.run()
    sums = SlotSums(None, grad, parts[0].sum(1), parts[1].sum(1))  # type: ignore[arg-type]
    return class_mask_loss_backward(None, sums, weight, classes, None, layout_of(features))


def class_mask_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor,
    classes: Tensor,
    targets: Tensor | None,
    slot_weight: Tensor,
    ground_truth: tuple[Tensor, Tensor, Tensor, Bitmaps, Sampling] | None = None,
) -> tuple[Tensor, SlotSums]:
    """See `cpu.class_mask_loss`.

    Where targets are None, `ground_truth` is what to cut them from: boxes, image, matched, tables and how.
    """
    slots, _, height, width = features.shape
    slope, parts, launch = forward.loss_launch(
        features, weight, bias, classes, targets, slot_weight, ground_truth
    )
    if slots:
        launch.run()
    weight_sums, bias_sums, losses = (part.sum(1) for part in parts)
    loss, divisor = slope.new_empty(()), slope.new_empty(())
    Launch(
        mask_loss_kernel._mean_kernel,
        (1,),
        {
            "slot_sum_ptr": losses,
            "weight_ptr": plain(slot_weight),
            "loss_ptr": loss,
            "divisor_ptr": divisor,
            "slots": slots,
            "pixels": height * width,
            "SLOTS": mask_loss_kernel.SLOTS,
        },
    ).run()
    return loss, SlotSums(divisor, slope, weight_sums, bias_sums)


def class_mask_loss_backward(
    grad: Tensor | None,
    sums: SlotSums,
    weight: Tensor,
    classes: Tensor,
    slot_weight: Tensor | None,
    layout: FeatureLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """See `cpu.class_mask_loss_backward`. Without grad there is nothing to scale by."""
    grads, (of_features, of_weight) = backward.launches(grad, sums, weight, classes, slot_weight, layout)
    if grads[0].numel():
        of_features.run()
    of_weight.run()
    return grads


def compile_specs() -> list[CompileSpec]:
    """128 and 48 slots of each of 8 images, 256 channels, 80 classes, 28x28.

    The least bytes are those of the features, and of their gradient. Operations: the products of the
    predictor, and of the sums for its gradient.
    """
    layouts = [
        (slots, dtype, channels_last)
        for slots in (8 * 128, 8 * 48)
        for dtype in (torch.float32, torch.bfloat16)
        for channels_last in (False, True)
        if slots == 8 * 128 or (dtype == torch.bfloat16 and channels_last)
    ]
    return [spec for slots, dtype, channels_last in layouts for spec in _specs(slots, dtype, channels_last)]


def _specs(slots: int, dtype: torch.dtype, channels_last: bool) -> list[CompileSpec]:
    K, channels, side = 80, 256, 28
    meta = torch.device("meta")
    layout = FeatureLayout(dtype, channels_last)
    features = layout.empty(slots, channels, side, side, device=meta)
    weight, bias = torch.empty((K, channels), device=meta), torch.empty((K,), device=meta)
    how = Sampling((800, 1344), side, 2, True, True)
    boxes, image, matched, valid, bitmaps, _ = example(slots, how)
    targets = torch.empty((slots, side, side), dtype=torch.bool, device=meta)
    arguments = (features, weight, bias, image)
    _, logits = forward.logits_launch(*arguments)
    slope, (weight_sums, bias_sums, _), loss = forward.loss_launch(*arguments, targets, valid, None)
    _, _, fused = forward.loss_launch(*arguments, None, valid, (boxes, image, matched, bitmaps, how))
    _, sums = backward.sums_launch(slope, features, weight, image)
    kept = SlotSums(bias[0], slope, weight_sums.sum(1), bias_sums.sum(1))
    _, (of_features, of_weight) = backward.launches(bias[0], kept, weight, image, valid, layout)

    variant = (
        f"{'bf16' if dtype == torch.bfloat16 else 'fp32'} {'channels_last' if channels_last else 'nchw'}"
    )
    wide = 16 if channels_last and dtype == torch.bfloat16 else None
    elements, moved, small = features.numel(), features.nbytes, slope.nbytes
    trips = logits.arguments["part"] / logits.arguments["ROWS"]
    return [
        logits.spec(f"class_mask_logits {slots}", variant, moved + small, 2 * elements, wide, trips),
        loss.spec(
            f"class_mask_loss {slots}", variant, moved + targets.nbytes + small, 4 * elements, wide, trips
        ),
        # Its loads of features are as wide, but in its code those from the tables outnumber them.
        fused.spec(f"class_mask_loss_from_bitmaps {slots}", variant, moved + small, 4 * elements),
        sums.spec(
            f"class_mask_logits backward sums {slots}", variant, moved + small, 2 * elements, wide, trips
        ),
        of_features.spec(f"class_mask_loss backward {slots}", variant, moved + small, elements, trips=trips),
        of_weight.spec(
            f"class_mask_loss backward weight {slots}",
            "fp32",
            kept.weight_sums.nbytes + weight.nbytes,
            slots * channels,
        ),
    ]
