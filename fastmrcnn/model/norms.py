"""Normalisation layers, by name."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from fastmrcnn.model.sync_norm import SyncBatchNorm2d

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and a fixed affine map: buffers, no parameters."""

    folded = True  # Conv2d may multiply the scale into its weights and add the shift as its bias

    def __init__(self, channels: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.register_buffer("weight", torch.ones(channels))
        self.register_buffer("bias", torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def affine(self) -> tuple[Tensor, Tensor]:
        """Scale and shift of each channel, (C,) float32."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        return scale, self.bias - self.running_mean * scale

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.affine()
        # Cast the small vectors, not the map: a float32 scale would widen a bf16 map.
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def fold_norms(model: nn.Module, folded: bool) -> None:
    """Whether the model's frozen norms are folded into the convolutions before them."""
    for module in model.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.folded = folded


def make_norm(name: str, eps: float = 1e-5) -> Norm:
    """Constructor of a normalisation layer: frozen_bn | bn | sync_bn | gn."""
    makers: dict[str, Norm] = {
        "frozen_bn": lambda channels: FrozenBatchNorm2d(channels, eps),
        "bn": lambda channels: nn.BatchNorm2d(channels, eps),
        "sync_bn": lambda channels: SyncBatchNorm2d(channels, eps),
        "gn": lambda channels: nn.GroupNorm(_groups(channels), channels, eps),
    }
    if name not in makers:
        raise ValueError(f"norm must be one of {', '.join(makers)}, got {name}")
    return makers[name]


def _groups(channels: int) -> int:
    """32 groups (arXiv 1803.08494), or fewer where that leaves under 4 channels in a group."""
    groups = min(32, max(1, channels // 4))
    while channels % groups:
        groups -= 1
    return groups
