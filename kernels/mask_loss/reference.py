"""Sigmoid cross-entropy on the mask channel of each slot's class, in PyTorch; what CPU tensors run."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.library import sum_dtype


def mask_loss(logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `op.mask_loss`. Differentiable.

    Returns:
        The loss and what its sum was divided by, max(sum of weight, 1) pixels of a mask, both scalars.
    """
    height, width = logits.shape[2:]
    x, target, active = _active_pixels(logits, classes, targets, weight)
    divisor = weight.to(x.dtype).sum().clamp(min=1) * (height * width)
    per_slot = F.binary_cross_entropy_with_logits(x, target, reduction="none").sum((1, 2))
    return (per_slot * active).sum() / divisor, divisor


def mask_loss_backward(
    grad: Tensor, divisor: Tensor, logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> Tensor:
    """Gradient with respect to logits (F, K, M, M), in their dtype and layout; zero in other channels."""
    x, target, active = _active_pixels(logits, classes, targets, weight)
    per_pixel = (x.sigmoid() - target) * (active * (grad / divisor))[:, None, None]
    per_pixel = per_pixel.where(active[:, None, None] != 0, 0)
    grad_logits = torch.zeros_like(logits)
    return grad_logits.scatter_(1, _channel(logits, classes), per_pixel.to(logits.dtype)[:, None])


def _active_pixels(
    logits: Tensor, classes: Tensor, targets: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(F, M, M) logits of the class and targets, zero in slots that do not count; and (F,) weights."""
    dtype = sum_dtype(logits)
    K, classes = logits.shape[1], classes.long()
    active = weight.to(dtype)
    if K > 1:
        active = active.where((classes >= 0) & (classes < K), 0)
    counts = (active != 0)[:, None, None]
    x = logits.gather(1, _channel(logits, classes)).squeeze(1).to(dtype)
    return x.where(counts, 0), targets.to(dtype).where(counts, 0), active


def _channel(logits: Tensor, classes: Tensor) -> Tensor:
    """(F, 1, M, M) int64, the channel to read: the class, or the only one there is."""
    slots, K, height, width = logits.shape
    return classes.long().clamp(0, K - 1).view(slots, 1, 1, 1).expand(slots, 1, height, width)
