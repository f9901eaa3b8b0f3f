"""Feature pyramid network (arXiv 1612.03144)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.model.norms import Norm


class FeaturePyramid(nn.Module):
    """res2..res5 -> p2..p6. p6 is every second pixel of p5, for the proposals only.

    Args:
        in_channels: of res2..res5.
        channels: of every level.
        norm: after each convolution, which then has no bias; None: a bias and no norm.
    """

    def __init__(self, in_channels: Sequence[int], *, channels: int, norm: Norm | None) -> None:
        super().__init__()
        self.channels = channels
        self.strides = [4 * 2**index for index in range(len(in_channels) + 1)]  # of p2..p6
        self.lateral = nn.ModuleList(_conv(inputs, channels, 1, norm) for inputs in in_channels)
        self.output = nn.ModuleList(_conv(channels, channels, 3, norm) for _ in in_channels)

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        top_down: Tensor | None = None
        outputs: list[Tensor] = []
        for feature, lateral, output in zip(
            reversed(features), reversed(self.lateral), reversed(self.output), strict=True
        ):
            x = lateral(feature)
            if top_down is not None:
                x = add_doubled(x, top_down)
            top_down = x
            outputs.insert(0, output(x))
        outputs.append(F.max_pool2d(outputs[-1], 1, stride=2))
        return outputs


def add_doubled(fine: Tensor, coarse: Tensor) -> Tensor:
    """fine + the nearest neighbours of coarse, (N, C, 2h, 2w) + (N, C, h, w), in their own dtype and layout.

    What `interpolate` computes. But under autocast on CUDA that is a map in float32, and compiled it has a
    gradient that is added up atomically, in float32 and in another layout.

    Raises:
        RuntimeError: fine is not twice as large.
    """
    return _AddDoubled.apply(fine, coarse)


class _AddDoubled(torch.autograd.Function):
    @staticmethod
    def forward(fine: Tensor, coarse: Tensor) -> Tensor:
        # Read where they are wanted: by views of six axes the sum would be made in one layout and then copied
        # into that of the convolution that reads it.
        with torch.autocast(fine.device.type, enabled=False):
            return fine + F.interpolate(coarse, scale_factor=2.0, mode="nearest")

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # The sum of each 2x2: a sum over the axes of a view would not keep channels_last.
        return grad, F.avg_pool2d(grad, 2, divisor_override=1)


def _conv(inputs: int, outputs: int, kernel: int, norm: Norm | None) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=norm is None)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return nn.Sequential(conv) if norm is None else nn.Sequential(conv, norm(outputs))
