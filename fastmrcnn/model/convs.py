"""A stack of 3x3 convolutions, as heads have it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.model.backbone import Norm


def make_convs(
    inputs: int, channels: int, count: int, norm: Norm | None = None
) -> tuple[nn.ModuleList, nn.ModuleList]:
    """`count` convolutions, and a norm for each, with which they have no bias; no norms if there is none."""
    convs = nn.ModuleList(
        nn.Conv2d(inputs if index == 0 else channels, channels, 3, padding=1, bias=norm is None)
        for index in range(count)
    )
    return convs, nn.ModuleList([] if norm is None else [norm(channels) for _ in convs])


def init_convs(convs: nn.ModuleList) -> None:
    for conv in convs:
        assert isinstance(conv, nn.Conv2d)
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
        if conv.bias is not None:
            nn.init.zeros_(conv.bias)


def run_convs(x: Tensor, convs: nn.ModuleList, norms: nn.ModuleList) -> Tensor:
    """(F, C, h, w) -> (F, channels, h, w), a ReLU after each."""
    for index, conv in enumerate(convs):
        x = conv(x)
        if len(norms):
            x = norms[index](x)
        x = F.relu(x, inplace=True)
    return x
