"""A network of timm as the backbone: its maps at strides 4, 8, 16 and 32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MethodType, ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastmrcnn.errors import UserError

STRIDES = (4, 8, 16, 32)
_SERVE = "such as ConvNeXt, Swin, EfficientNet, MobileNetV3, RegNet, HRNet or ResNet do"
_NO_BRANCHES = "model.backbone.drop_path: timm's {} has no branches to leave out; set it to 0"
_PROBE = (96, 160)  # of the image on which a network is tried: multiples of 32, and not a square
_BATCH_NORMS = (nn.BatchNorm2d, nn.SyncBatchNorm)


class TimmBackbone(nn.Module):
    """
    The network stays as timm builds it, its classifier left out. Where it has no batch norms, its maps are
    sums of residuals that nothing has normalised, and each gets a layer norm, as the detectors of the papers
    on Swin (arXiv 2103.14030) and ConvNeXt (arXiv 2201.03545) have it.

    Args:
        timm: the library.
        name: of the network, known to timm.
        norm: frozen_bn: batch norms, if there are any, keep statistics, scale and shift; bn: they learn.
        frozen_stages: 0 none, 1 the stem, 2 also whatever the map of stride 4 hangs on, 3 that of stride 8,
            and so on. Frozen parts keep their weights and statistics.
        drop_path: largest share of an image's residual branches that are left out in training, growing from
            0 at the first block (stochastic depth, arXiv 1603.09382). Which are, comes in as keys.
    Raises:
        UserError: the network has no such maps, or not for images of every size; or cannot be frozen so far;
            or has no residual branches to leave out.
    """

    def __init__(
        self, timm: ModuleType, name: str, *, norm: str, frozen_stages: int, drop_path: float
    ) -> None:
        super().__init__()
        self.name = name
        self.frozen_stages = frozen_stages
        self.strides = list(STRIDES)
        self.timm: Any
        self.timm, self.options = _create(timm, name, drop_path)
        for module in self.timm.modules():
            if getattr(module, "dynamic_mask", False) and hasattr(module, "get_attn_mask"):
                module.get_attn_mask = MethodType(_shift_mask, module)
        self.out_channels = [int(count) for count in self.timm.feature_info.channels()]
        self._channels_last = _channels_last(self.timm)
        self.norms = nn.ModuleList()
        whole = self.whole_network(timm)
        self._whole_names = _names_in(whole, self.timm)
        skip = set(whole.no_weight_decay()) if hasattr(whole, "no_weight_decay") else set()
        self.no_decay = {f"timm.{own}" for own, key in self._whole_names.items() if key in skip}
        first_map = self._try_out(timm, drop_path > 0)
        self._layers = first_map
        if hasattr(whole, "group_matcher"):
            groups = timm.models.group_parameters(whole, whole.group_matcher(coarse=False), reverse=True)
            self._layers = _renumbered(name, whole, self._whole_names, groups)
        self._freeze(first_map)
        if not any(isinstance(module, _BATCH_NORMS) for module in self.timm.modules()):
            self.norms.extend(ChannelNorm(channels) for channels in self.out_channels)
        self._frozen_norms = [
            module
            for module in self.timm.modules()
            if isinstance(module, _BATCH_NORMS)
            and (norm == "frozen_bn" or not any(p.requires_grad for p in module.parameters()))
        ]
        for module in self._frozen_norms:
            module.requires_grad_(False)
        self.drops = _keyed_drops(timm, self.timm)
        if drop_path and not self.drops:
            raise UserError(_NO_BRANCHES.format(name))

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        for module in self._frozen_norms:
            module.eval()
        return self

    def forward(self, x: Tensor, drop_keys: Tensor | None = None) -> list[Tensor]:
        """(N, 3, H, W) -> maps at strides 4, 8, 16, 32.

        Args:
            drop_keys: (N, len(self.drops)) uniform in 0..1; needed in training if any branch is left out.
        """
        if self.drops and self.training:
            if drop_keys is None:
                raise ValueError("training with drop_path needs keys for it")
            for drop, keys in zip(self.drops, drop_keys.unbind(1), strict=True):
                drop.keys = keys
        maps = list(self.timm(x))
        for drop in self.drops:
            drop.keys = None
        if self._channels_last:
            maps = [one.permute(0, 3, 1, 2) for one in maps]
        return [norm(one) for norm, one in zip(self.norms, maps, strict=True)] if self.norms else maps

    def layers(self) -> dict[str, int]:
        """Layer of each of timm's parameters, for `optim.layer_decay`: 0 is the stem. The maps' layer norms
        are not among them: they are new, and learn as the heads do."""
        last = max(self._layers.values())
        return {f"timm.{key}": self._layers.get(key, last) for key, _ in self.timm.named_parameters()}

    def whole_network(self, timm: ModuleType) -> Any:
        """timm's classifier that the maps are of, its tensors of shape alone."""
        with torch.device("meta"):
            whole: Any = timm.create_model(self.name, pretrained=False, **self.options)
        return whole

    def whole_names(self) -> dict[str, str]:
        """Name in timm's classifier of each entry of this module's state dict that is timm's."""
        return {f"timm.{own}": key for own, key in self._whole_names.items() if own in self.timm.state_dict()}

    def _try_out(self, timm: ModuleType, drops: bool) -> dict[str, int]:
        """Run the network without computing anything; returns the first map that each parameter reaches, from
        1 for that of stride 4.

        Args:
            drops: branches will be left out.
        Raises:
            UserError: the maps do not have the strides and channels that they should; or what is to be left
                out is not in rows that each are an image.
        """
        rows: set[int] = set()
        hooks = [
            module.register_forward_pre_hook(lambda _, inputs: rows.add(len(inputs[0])))
            for module in self.timm.modules()
            if isinstance(module, timm.layers.DropPath)
        ]
        params = {
            key: torch.empty_like(value, device="meta").requires_grad_()
            for key, value in self.timm.named_parameters()
        }
        buffers = {key: torch.empty_like(value, device="meta") for key, value in self.timm.named_buffers()}
        image = torch.empty(2, 3, *_PROBE, device="meta")
        training = self.timm.training
        self.timm.eval()
        try:
            with torch.enable_grad():
                maps = torch.func.functional_call(self.timm, {**params, **buffers}, (image,))
            maps = [one.permute(0, 3, 1, 2) for one in maps] if self._channels_last else list(maps)
        except (RuntimeError, AssertionError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"model.backbone.name: timm's {self.name} does not take images of every size ({reason}); "
                f"choose a network that does, {_SERVE}"
            ) from None
        finally:
            self.timm.train(training)
            for hook in hooks:
                hook.remove()
        if drops and not rows <= {len(image)}:
            raise UserError(
                f"model.backbone.drop_path: a branch of timm's {self.name} does not hold an image in each "
                "row, so that none can be left out by itself; set it to 0"
            )
        want = [
            (channels, _PROBE[0] // stride, _PROBE[1] // stride)
            for channels, stride in zip(self.out_channels, STRIDES, strict=True)
        ]
        if (got := [tuple(one.shape[1:]) for one in maps]) != want:
            raise UserError(
                f"model.backbone.name: timm's {self.name} gives maps of {got} for an image of {_PROBE[0]}x"
                f"{_PROBE[1]}, where {want} are needed; choose a network that gives these, {_SERVE}"
            )
        first: dict[str, int] = {}
        for index, one in enumerate(maps, start=1):
            found = torch.autograd.grad(
                one, list(params.values()), torch.empty_like(one), retain_graph=True, allow_unused=True
            )
            for key, grad in zip(params, found, strict=True):
                if grad is not None:
                    first.setdefault(key, index)
        return first

    def _freeze(self, first_map: Mapping[str, int]) -> None:
        if self.frozen_stages == 0:
            return
        sizes = {key: value.numel() for key, value in self.timm.named_parameters()}
        early = sum(size for key, size in sizes.items() if first_map.get(key) == 1)
        if 1 < self.frozen_stages < 5 and early > sum(sizes.values()) / 4:
            raise UserError(
                f"model.backbone.frozen_stages: the map of stride 4 of timm's {self.name} hangs on much of "
                "the network, so no stage can be frozen by itself; set it to 0 or 1, or to 5 for all"
            )
        if self.frozen_stages == 1 and 0 not in self._layers.values():
            raise UserError(
                f"model.backbone.frozen_stages: timm does not tell the stem of {self.name}; set it to 0, or "
                "to 2 or more"
            )
        for key, value in self.timm.named_parameters():
            in_stem = self._layers.get(key) == 0
            if in_stem or first_map.get(key, len(STRIDES)) < self.frozen_stages:
                value.requires_grad_(False)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of (N, C, H, W)."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        x = x.permute(0, 2, 3, 1)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps).permute(0, 3, 1, 2)


class KeyedDropPath(nn.Module):
    """Leaves out the branch of some images in training, those whose key is below `rate`.

    The others are scaled up, so that the expectation stays. timm's own draws the choice by itself, which a
    step that is resumed, compiled or replayed would not repeat.
    """

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate
        self.keys: Tensor | None = None  # (N,) uniform in 0..1, for this step

    def forward(self, x: Tensor) -> Tensor:
        if self.keys is None or not self.training:
            return x
        scale = (self.keys >= self.rate).to(x.dtype) / (1 - self.rate)
        return x * scale.reshape(-1, *(1,) * (x.dim() - 1))

    def extra_repr(self) -> str:
        return f"rate={self.rate:.3g}"


def _create(timm: ModuleType, name: str, drop_path: float) -> tuple[nn.Module, dict[str, Any]]:
    """The network that gives maps, and the options that it was built with."""
    drop = {"drop_path_rate": drop_path} if drop_path else {}
    # Networks with windows or position tables are told that images come in more than one size, and that maps
    # are larger than their windows. Those that have none take no such options.
    sizes: tuple[dict[str, bool], ...] = (
        {"strict_img_size": False, "always_partition": True},
        {"strict_img_size": False},
        {},
    )
    for options in ({**one, **drop} for one in sizes):
        try:
            with torch.device("meta"):
                found = timm.create_model(name, pretrained=False, features_only=True, **options)
        except TypeError as error:
            if not any(key in str(error) for key in options):
                raise
            if "drop_path_rate" in str(error):
                raise UserError(_NO_BRANCHES.format(name)) from None
            continue
        except (RuntimeError, AttributeError, AssertionError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(
                f"model.backbone.name: timm's {name} gives no feature maps ({reason}); choose a network that "
                f"does, {_SERVE}"
            ) from None
        strides = list(found.feature_info.reduction())
        if not set(STRIDES) <= set(strides):
            shown = ", ".join(str(one) for one in sorted(set(strides)))
            raise UserError(
                f"model.backbone.name: timm's {name} gives maps of stride {shown} only, and a pyramid "
                f"needs 4, 8, 16 and 32; choose a network that has them, {_SERVE}"
            )
        # Of several maps of one stride the last knows most.
        indices = [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
        net = timm.create_model(name, pretrained=False, features_only=True, out_indices=indices, **options)
        return net, options
    raise AssertionError("the last options are those that every network takes")


def _channels_last(net: nn.Module) -> bool:
    """Whether the maps come as (N, H, W, C)."""
    return str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")


def _names_in(whole: nn.Module, net: nn.Module) -> dict[str, str]:
    """Name in the classifier of every entry of the feature network's state dict.

    timm's wrappers put `model.` before it or make one name of the first two, stages.0 to stages_0.
    """
    theirs = set(whole.state_dict()) | {key for key, _ in whole.named_parameters()}
    found = {}
    for key in dict.fromkeys([*net.state_dict(), *(name for name, _ in net.named_parameters())]):
        first, dot, rest = key.partition(".")
        split = [first[:at] + "." + first[at + 1 :] + dot + rest for at, c in enumerate(first) if c == "_"]
        fitting = [one for one in (key, key.removeprefix("model."), *split) if one in theirs]
        if fitting:
            found[key] = fitting[0]
    return found


def _renumbered(
    name: str, whole: nn.Module, names: Mapping[str, str], groups: Mapping[str, int]
) -> dict[str, int]:
    """Layers of the feature network's parameters, counted from 0 without gaps.

    Those of ConvNeXt are counted as its authors do: a stage is a layer, but of the third one, which has most
    blocks, every three are.
    """
    if name.startswith("convnext") and (stages := getattr(whole, "stages", None)) is not None:
        depth = len(stages[2].blocks)
        groups = {key: _convnext_layer(key, depth) for key in names.values()}
    found = {own: groups[key] for own, key in names.items() if key in groups}
    order = {layer: number for number, layer in enumerate(sorted(set(found.values())))}
    return {own: order[layer] for own, layer in found.items()}


def _convnext_layer(key: str, depth: int) -> int:
    """As in ConvNeXt's detection code: a downsampling belongs to the stage that it leads to."""
    parts = key.split(".")
    if parts[0] != "stages":
        return 0 if parts[0] == "stem" else 4 + (depth - 1) // 3
    stage, inside = int(parts[1]), parts[2:]
    if stage < 2:
        return 1 + stage
    if stage == 2:
        return 3 + (int(inside[1]) // 3 if inside[0] == "blocks" else 0)
    return 4 + (depth - 1) // 3


def _shift_mask(block: Any, x: Tensor | None = None, **_: object) -> Tensor | None:
    """The mask of Swin's shifted windows, in place of timm's, which writes numbers into a map one by one.

    Args:
        block: has `window_size` and `shift_size`, (rows, columns).
        x: (N, H, W, C), H and W multiples of the window.
    Returns:
        (windows, area, area), -100 between pixels of a window that are not neighbours in the image, else 0.
    """
    if x is None or not any(block.shift_size):
        return None
    sizes, parts = x.shape[1:3], []
    for size, window, shift in zip(sizes, block.window_size, block.shift_size, strict=True):
        place = torch.arange(size, device=x.device)
        parts.append((place >= size - window).int() + (place >= size - shift).int())
    region = parts[0][:, None] * 3 + parts[1]
    high, wide = block.window_size
    region = region.unflatten(1, (-1, wide)).unflatten(0, (-1, high)).transpose(1, 2).flatten(2).flatten(0, 1)
    apart = region[:, None] != region[:, :, None]
    return torch.where(apart, -100.0, 0.0).to(x.dtype)


def _keyed_drops(timm: ModuleType, net: nn.Module) -> Sequence[KeyedDropPath]:
    """Put ours in place of timm's, in the order of the network; those in frozen blocks drop nothing."""
    drops: list[KeyedDropPath] = []
    for parent in list(net.modules()):
        learns = any(p.requires_grad for p in parent.parameters())
        for key, child in list(parent.named_children()):
            if not isinstance(child, timm.layers.DropPath):
                continue
            if child.drop_prob and learns:
                drops.append(KeyedDropPath(float(child.drop_prob)))
                setattr(parent, key, drops[-1])
            else:
                setattr(parent, key, nn.Identity())
    return drops
