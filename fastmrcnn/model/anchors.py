"""Anchors of one feature map or a pyramid (arXiv 1506.01497, 1612.03144)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class AnchorGenerator(nn.Module):
    """Makes the same anchors for every image of a padded batch.

    Args:
        strides: of the levels, in pixels.
        sizes: sides of the square anchors, a list per level.
        aspect_ratios: height over width.
        rounding: round the base anchors to whole pixels, as torchvision does.
        stride_rule: nominal (4, 8, ...) or grid (padded size // grid size, as torchvision does).
        offset: of the centres, in strides.
    """

    def __init__(
        self,
        strides: Sequence[int],
        *,
        sizes: Sequence[Sequence[float]],
        aspect_ratios: Sequence[float],
        rounding: bool,
        stride_rule: str,
        offset: float,
    ) -> None:
        super().__init__()
        if len(sizes) != len(strides):
            raise ValueError(f"sizes are of {len(sizes)} levels, strides of {len(strides)}")
        self.strides = list(strides)
        self.base = [_base_anchors(level, aspect_ratios, rounding) for level in sizes]
        self.per_cell = [len(level) for level in self.base]
        self.stride_rule = stride_rule
        self.offset = offset
        # On the device beforehand: a step that is recorded as a CUDA graph may not copy numbers there.
        for index, level in enumerate(self.base):
            self.register_buffer(f"base{index}", torch.tensor(level), persistent=False)

    def count(self, height: int, width: int) -> int:
        """R: anchors of an image of that padded size."""
        return sum(
            each * -(-height // stride) * -(-width // stride)
            for each, stride in zip(self.per_cell, self.strides, strict=True)
        )

    def forward(self, features: Sequence[Tensor], image_shape: Sequence[int]) -> list[Tensor]:
        """Anchors per level, (R_l, 4) float32, in the order row, column, size, aspect ratio."""
        anchors = []
        for index, (feature, stride) in enumerate(zip(features, self.strides, strict=True)):
            height, width = feature.shape[-2:]
            step_y, step_x = stride, stride
            if self.stride_rule == "grid":
                step_y, step_x = image_shape[0] // height, image_shape[1] // width
            device = feature.device
            y = (torch.arange(height, device=device, dtype=torch.float32) + self.offset) * step_y
            x = (torch.arange(width, device=device, dtype=torch.float32) + self.offset) * step_x
            yy, xx = torch.meshgrid(y, x, indexing="ij")
            shift = torch.stack([xx, yy, xx, yy], -1).reshape(-1, 1, 4)
            anchors.append((shift + self.get_buffer(f"base{index}").to(device)).reshape(-1, 4))
        return anchors


def _base_anchors(
    sizes: Sequence[float], aspect_ratios: Sequence[float], rounding: bool
) -> list[list[float]]:
    """Anchors about the origin."""
    boxes = []
    for size in sizes:
        for ratio in aspect_ratios:
            width = size / math.sqrt(ratio)
            height = width * ratio
            box = [-width / 2, -height / 2, width / 2, height / 2]
            boxes.append([float(round(side)) for side in box] if rounding else box)
    return boxes
