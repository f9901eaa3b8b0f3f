"""What mask paste and mask RLE refuse."""

from __future__ import annotations

import torch
from torch import Tensor


def check(
    masks: Tensor, boxes: Tensor, height: int, width: int, threshold: float, valid: Tensor | None
) -> None:
    """Raise ValueError for what `paste_masks` says it raises for."""
    if masks.ndim != 3 or masks.shape[1] != masks.shape[2] or masks.shape[1] < 1:
        raise ValueError(f"masks must be (D, M, M), got {tuple(masks.shape)}")
    slots = masks.shape[0]
    check_table("boxes", boxes, (slots, 4), masks)
    for name, tensor in (("masks", masks), ("boxes", boxes)):
        if not tensor.is_floating_point():
            raise ValueError(f"{name} must be floating point, got {tensor.dtype}")
    if valid is not None:
        check_table("valid", valid, (slots,), masks)
        if valid.dtype != torch.bool:
            raise ValueError(f"valid must be bool, got {valid.dtype}")
    for name, number in (("height", height), ("width", width)):
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold must be above 0 and at most 1, got {threshold}")


def check_table(name: str, tensor: Tensor, shape: tuple[int, ...], masks: Tensor) -> None:
    """One tensor beside the masks: its shape and its device."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} must be {shape}, got {tuple(tensor.shape)}")
    if tensor.device != masks.device:
        raise ValueError(f"{name} must be on {masks.device} as masks are, got {tensor.device}")
