"""What the mask predictor is asked, checked before any launch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..common.library import check_range


def check_predictor(
    features: Tensor, weight: Tensor, bias: Tensor | None, classes: Tensor
) -> tuple[Tensor, Tensor]:
    """Weight as (K, C), and bias."""
    if features.ndim != 4 or 0 in features.shape[1:]:
        raise ValueError(
            f"features must be (F, C, M, M) with C and M at least 1, got {tuple(features.shape)}"
        )
    slots, channels = features.shape[:2]
    shapes = ((channels,), (channels, 1, 1))
    if 0 in weight.shape or tuple(weight.shape[1:]) not in shapes:
        raise ValueError(
            f"weight must be (K, {channels}) or (K, {channels}, 1, 1) for features {tuple(features.shape)}, "
            f"got {tuple(weight.shape)}"
        )
    if bias is None:
        bias = weight.new_zeros(len(weight))
    for name, tensor, shape in (("bias", bias, (len(weight),)), ("classes", classes, (slots,))):
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("classes", classes)):
        _check_device(name, tensor, features)
    for name, tensor in (("features", features), ("weight", weight)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if bias.dtype != weight.dtype:
        raise ValueError(f"bias must be {weight.dtype} as weight is, got {bias.dtype}")
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise ValueError(f"classes must be of an integer dtype, got {classes.dtype}")
    return weight.flatten(1), bias


def check_loss(features: Tensor, targets: Tensor | None, slot_weight: Tensor) -> None:
    slots, _, height, width = features.shape
    expected: dict[str, tuple[Tensor, tuple[int, ...]]] = {"slot_weight": (slot_weight, (slots,))}
    if targets is not None:
        expected["targets"] = (targets, (slots, height, width))
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{name} must be {shape} for features {tuple(features.shape)}, got {tuple(tensor.shape)}"
            )
        _check_device(name, tensor, features)
        if tensor.is_complex():
            raise ValueError(f"{name} must be real, got {tensor.dtype}")


def check_classes(classes: Tensor, K: int, slot_weight: Tensor | None) -> None:
    if K > 1:
        check_range("classes of slots with weight", classes, K, slot_weight)


def _check_device(name: str, tensor: Tensor, features: Tensor) -> None:
    if tensor.device != features.device:
        raise ValueError(f"{name} must be on {features.device} as features are, got {tensor.device}")
