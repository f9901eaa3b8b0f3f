"""ResNet and ResNeXt (arXiv 1512.03385, 1611.05431), with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Norm = Callable[[int], nn.Module]


class FrozenBatchNorm2d(nn.Module):
    """Batch normalisation with fixed statistics and a fixed affine map: buffers, no parameters."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
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

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        # Cast the four small vectors, not the map: a float32 scale would widen a bf16 map.
        return torch.addcmul(shift.to(x.dtype)[:, None, None], x, scale.to(x.dtype)[:, None, None])

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}"


def make_norm(name: str, eps: float = 1e-5) -> Norm:
    """Constructor of a normalisation layer: frozen_bn | bn | sync_bn | gn."""
    makers: dict[str, Norm] = {
        "frozen_bn": lambda channels: FrozenBatchNorm2d(channels, eps),
        "bn": lambda channels: nn.BatchNorm2d(channels, eps),
        "sync_bn": lambda channels: nn.SyncBatchNorm(channels, eps),
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


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm, **_: object) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = nn.Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = self.bn2(self.conv2(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


class Bottleneck(nn.Module):
    expansion = 4

    def __init__(
        self,
        inputs: int,
        planes: int,
        stride: int,
        norm: Norm,
        *,
        groups: int,
        width_per_group: int,
        stride_in_1x1: bool,
    ) -> None:
        super().__init__()
        width = planes * width_per_group // 64 * groups
        outputs = planes * self.expansion
        first, second = (stride, 1) if stride_in_1x1 else (1, stride)
        self.conv1 = nn.Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, second, padding=1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        y = F.relu(self.bn2(self.conv2(y)), inplace=True)
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)), inplace=True)


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


# name: (block, blocks per stage, groups, width per group)
_ARCHITECTURES: dict[str, tuple[type[BasicBlock] | type[Bottleneck], tuple[int, ...], int, int]] = {
    "resnet18": (BasicBlock, (2, 2, 2, 2), 1, 64),
    "resnet34": (BasicBlock, (3, 4, 6, 3), 1, 64),
    "resnet50": (Bottleneck, (3, 4, 6, 3), 1, 64),
    "resnet101": (Bottleneck, (3, 4, 23, 3), 1, 64),
    "resnext50_32x4d": (Bottleneck, (3, 4, 6, 3), 32, 4),
    "resnext101_32x8d": (Bottleneck, (3, 4, 23, 3), 32, 8),
}


class ResNet(nn.Module):
    """Residual network without its classifier.

    Args:
        name: a key of the published networks, such as resnet50.
        norm: constructor of a normalisation layer from its number of channels.
        width: channels of the stem; 64 is the published network, the stages scale with it.
        stride_in_1x1: where a bottleneck downsamples.
        frozen_stages: 0 none, 1 the stem, 2 stem and res2, ..., 5 everything. Frozen stages keep
            their weights and, if their norm has statistics, those too.
    """

    def __init__(
        self,
        name: str,
        norm: Norm,
        *,
        width: int = 64,
        stride_in_1x1: bool = False,
        frozen_stages: int = 0,
    ) -> None:
        super().__init__()
        if name not in _ARCHITECTURES:
            raise ValueError(f"backbone must be one of {', '.join(_ARCHITECTURES)}, got {name}")
        block, depths, groups, width_per_group = _ARCHITECTURES[name]
        self.name = name
        self.frozen_stages = frozen_stages
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        inputs = width
        for index, depth in enumerate(depths):
            planes = width * 2**index
            layers: list[nn.Module] = []
            for position in range(depth):
                stride = 2 if index > 0 and position == 0 else 1
                layers.append(
                    block(
                        inputs,
                        planes,
                        stride,
                        norm,
                        groups=groups,
                        width_per_group=width_per_group,
                        stride_in_1x1=stride_in_1x1,
                    )
                )
                inputs = planes * block.expansion
            self.add_module(f"layer{index + 1}", nn.Sequential(*layers))
        self.out_channels = [width * 2**index * block.expansion for index in range(4)]
        self._initialise()
        for stage in self._frozen():
            stage.requires_grad_(False)

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def _frozen(self) -> list[nn.Module]:
        stages = [[self.conv1, self.bn1]] + [[getattr(self, f"layer{i}")] for i in range(1, 5)]
        return [module for stage in stages[: self.frozen_stages] for module in stage]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, 3, H, W) -> res2..res5 at strides 4, 8, 16, 32."""
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        x = F.max_pool2d(x, 3, stride=2, padding=1)
        features = []
        for index in range(1, 5):
            x = getattr(self, f"layer{index}")(x)
            features.append(x)
        return features
