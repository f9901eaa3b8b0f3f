"""The mask loss: public function and its registration."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._library import NAMESPACE, check_range, chosen, runs_triton, switchable
from . import reference


@switchable
def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> Tensor:
    """Mean sigmoid cross-entropy of the masks (Mask R-CNN, arXiv 1703.06870, section 3).

    Only the channel of a slot's class is read, in the dtype of the logits, and only it gets a gradient:
    sum over slots of weight * (sum over pixels of cross-entropy) / (max(sum of weight, 1) * M * M). With
    weights of 0 and 1 that is the mean over the pixels of the real slots, and 0 if there is none. The
    result and the gradient repeat bit for bit.

    Args:
        logits: (F, K, M, M) floating point, NCHW or channels_last; or (F, 1, M, M), class-agnostic: then
            classes are not looked at.
        classes: (F,) integer in 0..K-1.
        targets: (F, M, M) bool, integer or floating point, in 0..1. They get no gradient.
        weight: (F,) bool, integer or floating point, at least 0; 1 for real slots. Slots of weight 0 take
            no part, whatever stands in them, NaN included.

    Returns:
        Scalar: float64 for float64 logits, float32 otherwise, also under autocast.

    Raises:
        ValueError: a shape, dtype or device is not as above; in eager mode on the CPU also if the class of
            a slot with weight is out of range. On CUDA and when compiled such a slot adds nothing to the
            sum and gets no gradient.
    """
    _check(logits, classes, targets, weight)
    loss = chosen("mask_loss", _mask_loss, reference.mask_loss)
    return loss(logits, classes, targets.detach(), weight.detach())[0]


def _check(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> None:
    if logits.ndim != 4 or 0 in logits.shape[1:]:
        raise ValueError(f"logits must be (F, K, M, M) with K and M at least 1, got {tuple(logits.shape)}")
    slots, K, height, width = logits.shape
    expected = {
        "classes": (classes, (slots,)),
        "targets": (targets, (slots, height, width)),
        "weight": (weight, (slots,)),
    }
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for logits {tuple(logits.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.device != logits.device:
            raise ValueError(f"{name} must be on {logits.device} as logits are, got {tensor.device}")
        if tensor.is_complex():
            raise ValueError(f"{name} must be real, got {tensor.dtype}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if classes.is_floating_point() or classes.dtype == torch.bool:
        raise ValueError(f"classes must be of an integer dtype, got {classes.dtype}")
    if K > 1:
        check_range("classes of slots with weight", classes, K, weight)


@torch.library.custom_op(f"{NAMESPACE}::mask_loss", mutates_args=())
def _mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    if runs_triton(logits):
        from . import kernel

        return kernel.mask_loss(logits, classes, targets, weight)
    return reference.mask_loss(logits, classes, targets, weight)


@_mask_loss.register_fake
def _(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.sum_dtype(logits)
    return logits.new_empty((), dtype=dtype), logits.new_empty((), dtype=dtype)


@torch.library.custom_op(f"{NAMESPACE}::mask_loss_backward", mutates_args=())
def _mask_loss_backward(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    if runs_triton(logits):
        from . import kernel

        return kernel.mask_loss_backward(grad, divisor, logits, classes, targets, weight)
    return reference.mask_loss_backward(grad, divisor, logits, classes, targets, weight)


@_mask_loss_backward.register_fake
def _(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    return torch.empty_like(logits)


def _save_for_backward(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[1], *inputs)


def _backward(ctx: Any, grad: Tensor, _grad_divisor: Tensor) -> tuple[Tensor, None, None, None]:
    return _mask_loss_backward(grad, *ctx.saved_tensors), None, None, None


_mask_loss.register_autograd(_backward, setup_context=_save_for_backward)
