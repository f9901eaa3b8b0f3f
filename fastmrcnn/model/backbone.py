"""ResNet and ResNeXt (arXiv 1512.03385, 1611.05431), with torchvision's parameter names."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastmrcnn.model.convs import Conv2d
from fastmrcnn.model.norms import Norm


class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, norm: Norm, **_: object) -> None:
        super().__init__()
        self.conv1 = Conv2d(inputs, planes, 3, stride, padding=1, bias=False)
        self.bn1 = norm(planes)
        self.conv2 = Conv2d(planes, planes, 3, padding=1, bias=False)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x, self.bn1, relu=True)
        return self.conv2(y, self.bn2, residual=_residual(x, self.downsample), relu=True)


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
        self.conv1 = Conv2d(inputs, width, 1, first, bias=False)
        self.bn1 = norm(width)
        self.conv2 = Conv2d(width, width, 3, second, padding=1, groups=groups, bias=False)
        self.bn2 = norm(width)
        self.conv3 = Conv2d(width, outputs, 1, bias=False)
        self.bn3 = norm(outputs)
        self.downsample = _shortcut(inputs, outputs, stride, norm)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(x, self.bn1, relu=True)
        y = self.conv2(y, self.bn2, relu=True)
        return self.conv3(y, self.bn3, residual=_residual(x, self.downsample), relu=True)


def _shortcut(inputs: int, outputs: int, stride: int, norm: Norm) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(Conv2d(inputs, outputs, 1, stride, bias=False), norm(outputs))


def _residual(x: Tensor, downsample: nn.Sequential | None) -> Tensor:
    return x if downsample is None else downsample[0](x, downsample[1])


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
        stages: 4: res2..res5; 3: without res5, as C4 features are.
        frozen_stages: 0 none, 1 the stem, 2 stem and res2, ..., 5 everything. Frozen stages keep
            their weights and, if their norm has statistics, those too.
    """

    def __init__(
        self,
        name: str,
        norm: Norm,
        *,
        width: int,
        stride_in_1x1: bool,
        stages: int,
        frozen_stages: int,
    ) -> None:
        super().__init__()
        if name not in _ARCHITECTURES:
            raise ValueError(f"backbone must be one of {', '.join(_ARCHITECTURES)}, got {name}")
        self.name = name
        self.drops: Sequence[nn.Module] = ()  # no branch is left out in training
        self.frozen_stages = frozen_stages
        self.strides = [4 * 2**index for index in range(stages)]
        self.out_channels = [stage_channels(name, index, width) for index in range(1, stages + 1)]
        self.conv1 = Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        for index in range(1, stages + 1):
            self.add_module(f"layer{index}", _stage(name, index, norm, width, stride_in_1x1))
        _initialise(self)
        for frozen in self._frozen():
            frozen.requires_grad_(False)

    def _frozen(self) -> list[nn.Module]:
        stages = [self.get_submodule(f"layer{index}") for index in range(1, len(self.strides) + 1)]
        stem = [self.conv1, self.bn1] if self.frozen_stages > 0 else []
        return [*stem, *stages[: max(self.frozen_stages - 1, 0)]]

    def train(self, mode: bool = True) -> ResNet:
        super().train(mode)
        for stage in self._frozen():
            stage.eval()
        return self

    def layers(self) -> dict[str, int]:
        """Layer of each parameter, for `optim.layer_decay`: 0 for the stem, then one for each block."""
        blocks = [
            f"layer{stage}.{block}."
            for stage in range(1, len(self.strides) + 1)
            for block, _ in self.get_submodule(f"layer{stage}").named_children()
        ]
        number = {block: index for index, block in enumerate(blocks, start=1)}
        owners = {name: ".".join(name.split(".")[:2]) + "." for name, _ in self.named_parameters()}
        return {name: number.get(owner, 0) for name, owner in owners.items()}

    def forward(self, x: Tensor, _: Tensor | None = None) -> list[Tensor]:
        """(N, 3, H, W) -> res2, res3, ... at strides 4, 8, ..."""
        x = self.conv1.pooled(x, self.bn1)
        features = []
        for index in range(1, len(self.strides) + 1):
            x = getattr(self, f"layer{index}")(x)
            features.append(x)
        return features


def residual_stage(name: str, index: int, norm: Norm, *, width: int, stride_in_1x1: bool) -> nn.Sequential:
    """Stage `index` (1 is res2, 4 is res5) of a published network; from the second on it halves the map."""
    stage = _stage(name, index, norm, width, stride_in_1x1)
    _initialise(stage)
    return stage


def _stage(name: str, index: int, norm: Norm, width: int, stride_in_1x1: bool) -> nn.Sequential:
    block, depths, groups, width_per_group = _ARCHITECTURES[name]
    planes = width * 2 ** (index - 1)
    inputs = width if index == 1 else stage_channels(name, index - 1, width)
    layers: list[nn.Module] = []
    for position in range(depths[index - 1]):
        stride = 2 if index > 1 and position == 0 else 1
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
    return nn.Sequential(*layers)


def stage_channels(name: str, index: int, width: int) -> int:
    """Channels that stage `index` (1 is res2) puts out."""
    return width * 2 ** (index - 1) * _ARCHITECTURES[name][0].expansion


def _initialise(module: nn.Module) -> None:
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
