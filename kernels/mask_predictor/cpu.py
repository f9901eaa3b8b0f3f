"""The predictor of one class per slot, and its loss, as CPU tensors run them; `naive.py` says what it is."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..common.library import sum_dtype


class SlotSums(NamedTuple):
    """What forward keeps for backward. No feature is among it: each is read once, in forward."""

    divisor: Tensor  # () what the sum of the loss is divided by
    slope: Tensor  # (F, M, M) gradient of that sum with respect to the logits; 0 where a slot does not count
    weight_sums: Tensor  # (F, C) slope times features, summed over the pixels
    bias_sums: Tensor  # (F,) slope, summed over the pixels


class FeatureLayout(NamedTuple):
    """What the gradient of the features looks like."""

    dtype: torch.dtype
    channels_last: bool

    def empty(self, *shape: int, device: torch.device) -> Tensor:
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return torch.empty(shape, dtype=self.dtype, device=device, memory_format=form)


def layout_of(features: Tensor) -> FeatureLayout:
    """channels_last where the channels lie side by side, and there is more than one of them."""
    return FeatureLayout(
        features.dtype,
        not features.is_contiguous() and features.is_contiguous(memory_format=torch.channels_last),
    )


def class_mask_logits(features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor) -> Tensor:
    """See `op.class_mask_logits`; weight is (K, C). Differentiable."""
    dtype = sum_dtype(features)
    channel, active = _channel(classes, weight, None, dtype)
    rows = weight.to(dtype).index_select(0, channel)  # (F, C)
    logits = torch.einsum("fcyx,fc->fyx", features.to(dtype), rows)
    logits = logits + bias.to(dtype).index_select(0, channel)[:, None, None]
    return logits.where((active != 0)[:, None, None], 0)


def class_mask_logits_backward(
    grad: Tensor, features: Tensor, weight: Tensor, classes: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to features, weight and bias; grad is (F, M, M)."""
    dtype = sum_dtype(features)
    _, active = _channel(classes, weight, None, dtype)
    slope = grad.to(dtype).where((active != 0)[:, None, None], 0)
    one = torch.ones((), dtype=dtype, device=grad.device)
    sums = SlotSums(one, slope, _weight_sums(slope, features, active), slope.sum((1, 2)))
    return class_mask_loss_backward(one, sums, weight, classes, active, layout_of(features))


def class_mask_loss(
    features: Tensor, weight: Tensor, bias: Tensor, classes: Tensor, targets: Tensor, slot_weight: Tensor
) -> tuple[Tensor, SlotSums]:
    """See `op.class_mask_loss`; weight is (K, C). The loss is differentiable."""
    dtype = sum_dtype(features)
    height, width = features.shape[2:]
    _, active = _channel(classes, weight, slot_weight, dtype)
    counts = (active != 0)[:, None, None]
    logits = class_mask_logits(features, weight, bias, classes).where(counts, 0)
    targets = targets.to(dtype).where(counts, 0)
    divisor = slot_weight.to(dtype).sum().clamp(min=1) * (height * width)
    per_slot = F.binary_cross_entropy_with_logits(logits, targets, reduction="none").sum((1, 2))
    loss = (per_slot * active).sum() / divisor
    with torch.no_grad():
        slope = ((logits.sigmoid() - targets) * active[:, None, None]).where(counts, 0)
        weight_sums = _weight_sums(slope, features, active)
    return loss, SlotSums(divisor, slope, weight_sums, slope.sum((1, 2)))


def class_mask_loss_backward(
    grad: Tensor,
    sums: SlotSums,
    weight: Tensor,
    classes: Tensor,
    slot_weight: Tensor,
    layout: FeatureLayout,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients with respect to features (in `layout`), weight (K, C) and bias (K,)."""
    dtype = sums.slope.dtype
    channel, active = _channel(classes, weight, slot_weight, dtype)
    counts = active != 0
    scale = grad / sums.divisor
    rows = weight.to(dtype).index_select(0, channel).where(counts[:, None], 0)
    slope = (sums.slope * scale).where(counts[:, None, None], 0)
    grad_features = layout.empty(*rows.shape, *slope.shape[1:], device=weight.device)
    torch.mul(slope[:, None], rows[..., None, None], out=grad_features)
    weight_sums, bias_sums = sums.weight_sums.where(counts[:, None], 0), sums.bias_sums.where(counts, 0)
    grad_weight = torch.zeros_like(weight, dtype=dtype).index_add_(0, channel, weight_sums) * scale
    grad_bias = grad_weight.new_zeros(len(weight)).index_add_(0, channel, bias_sums) * scale
    return grad_features, grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


def _weight_sums(slope: Tensor, features: Tensor, active: Tensor) -> Tensor:
    """(F, C), zero for slots that do not count, whatever their features are."""
    sums = torch.einsum("fyx,fcyx->fc", slope, features.to(slope.dtype))
    return sums.where((active != 0)[:, None], 0)


def _channel(
    classes: Tensor, weight: Tensor, slot_weight: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(F,) the row of weight to use, and (F,) the slot's weight, which is 0 if its class is out of range."""
    K, classes = len(weight), classes.long()
    if slot_weight is None:
        slot_weight = torch.ones_like(classes)
    active = slot_weight.to(dtype)
    if K == 1:
        return torch.zeros_like(classes, dtype=torch.int64), active
    in_range = (classes >= 0) & (classes < K)
    return classes.clamp(0, K - 1), active.where(in_range, 0)
