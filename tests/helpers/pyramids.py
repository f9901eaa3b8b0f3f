"""Maps and boxes for the tests of what pools from a feature pyramid."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

SIZES = [(10, 13), (5, 7)]  # of two levels, with strides 4 and 8
SCALES = [1 / 4, 1 / 8]
LEVELS: dict[str, Any] = {"spatial_scales": SCALES, "canonical_size": 30.0, "canonical_level": 3}


def pyramid(
    channels: int = 3,
    dtype: torch.dtype = torch.float64,
    device: str = "cpu",
    form: torch.memory_format = torch.contiguous_format,
) -> list[Tensor]:
    """Of two images."""
    r = torch.Generator().manual_seed(1)
    maps = [torch.randn(2, channels, *size, generator=r) for size in SIZES]
    return [m.to(device, dtype).contiguous(memory_format=form).requires_grad_() for m in maps]


def on_cpu(maps: list[Tensor]) -> list[Tensor]:
    """The same values in float64, leaves of their own: what the definitions take."""
    return [m.detach().cpu().double().requires_grad_() for m in maps]


def some_boxes(per_image: int = 4, device: str = "cpu", longest: float = 45) -> tuple[Tensor, Tensor]:
    """(2, S, 4) and valid (2, S): the first image's second slot is not valid and holds NaN."""
    r = torch.Generator().manual_seed(2)
    corner = torch.rand(2, per_image, 2, generator=r) * 40 - 8
    boxes = torch.cat([corner, corner + torch.rand(2, per_image, 2, generator=r) * longest], dim=-1)
    valid = torch.ones(2, per_image, dtype=torch.bool)
    if per_image > 1:
        valid[0, 1], boxes[0, 1] = False, torch.nan
    return boxes.to(device), valid.to(device)


def permuted(tensor: Tensor) -> Tensor:
    """The same values, dense, with strides that are neither NCHW's nor channels_last's."""
    return tensor.detach().permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0)
