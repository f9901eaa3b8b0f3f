"""What the mask predictor is asked, checked before any launch."""

from __future__ import annotations

from torch import Tensor

from ..common.checks import check_range, require


def check_predictor(
    features: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight as (K, C), and bias."""
    require("features", features, ("F", "C", "H", "W"), "floating point")
    (slots, channels), like = features.shape[:2], ("features", features)
    require("weight", weight, [("K", channels), ("K", channels, 1, 1)], "floating point", like)
    if bias is None:
        bias = weight.new_zeros(len(weight))
    require("bias", bias, (len(weight),), weight.dtype, ("weight", weight))
    require("classes", classes, (slots,), "integer", like)
    return weight.flatten(1), bias


def check_loss(features: Tensor, targets: Tensor | None, slot_weight: Tensor) -> None:
    slots, _, height, width = features.shape
    like = ("features", features)
    require("slot_weight", slot_weight, (slots,), "real", like)
    require("targets", targets, (slots, height, width), "real", like)


def check_classes(classes: Tensor, K: int, slot_weight: Tensor | None) -> None:
    if K > 1:
        check_range("classes of slots with weight", classes, K, slot_weight)
