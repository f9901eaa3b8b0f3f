"""The predictor of one class per slot, and its loss, by way of all classes: the definition, in float64.

Arguments are those of the functions of the same name in `op`. Autograd gives the gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..mask_targets.naive import mask_targets


def class_mask_logits(features: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor) -> Tensor:
    """(F, M, M): a 1x1 convolution to all classes, and of each slot its own; zeros if there is no such class.

    If there is one class, it is that of all slots.
    """
    weight, bias = weight.double().flatten(1), None if bias is None else bias.double()
    logits = features.new_zeros((len(features), *features.shape[2:]), dtype=torch.float64)
    for slot, number in enumerate(classes.tolist() if len(weight) > 1 else [0] * len(features)):
        if number in range(len(weight)):
            of_all = F.conv2d(features[slot : slot + 1].double(), weight[:, :, None, None], bias)
            logits[slot] = of_all[0, number]
    return logits


def class_mask_loss(
    features: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    classes: Tensor,
    targets: Tensor,
    slot_weight: Tensor,
) -> Tensor:
    """Binary cross-entropy, the weighted mean over all slots (Mask R-CNN, arXiv 1703.06870, section 3).

    Slots without weight have no part in it, whatever they hold; one whose class does not exist adds nothing.
    """
    classes = classes.long()
    exists = (classes >= 0) & (classes < len(weight)) | (len(weight) == 1)
    (some,) = torch.where(exists & (slot_weight != 0))
    logits = class_mask_logits(features[some], weight, bias, classes[some])
    per_pixel = F.binary_cross_entropy_with_logits(logits, targets[some].double(), reduction="none")
    shares = slot_weight.double() / slot_weight.double().sum().clamp(min=1)
    return (per_pixel.mean((1, 2)) * shares[some]).sum()


def class_mask_loss_from_bitmaps(
    features: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor, slot_weight: Tensor, **truth: Any
) -> Tensor:
    """The same with the targets of `mask_targets`, whose arguments `truth` holds; bits unless asked for."""
    truth = {"bitmap": True, **truth}
    targets = mask_targets(**truth, resolution=features.shape[-1], valid=slot_weight)
    return class_mask_loss(features, weight, bias, classes, targets, slot_weight)
