"""State dicts: checked as a whole before anything is copied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastmrcnn.errors import UserError
from fastmrcnn.weights.peers.programs import grouped, import_backbone, program_of
from fastmrcnn.weights.sources import find_weights, read_weights
from fastmrcnn.weights.wrappers import unwrap

COUNTER = ".num_batches_tracked"

# (blocks per stage, bottleneck?, filters of layer1's 3x3 convolution, channels that each one reads),
# the last two for a stem of 64 channels. It takes this much to tell the published networks apart.
_NETWORKS: dict[tuple[tuple[int, ...], bool, int, int], str] = {
    ((2, 2, 2, 2), False, 64, 64): "resnet18",
    ((3, 4, 6, 3), False, 64, 64): "resnet34",
    ((3, 4, 6, 3), True, 64, 64): "resnet50",
    ((3, 4, 23, 3), True, 64, 64): "resnet101",
    ((3, 8, 36, 3), True, 64, 64): "resnet152",
    ((3, 4, 6, 3), True, 128, 4): "resnext50_32x4d",
    ((3, 4, 23, 3), True, 256, 8): "resnext101_32x8d",
    ((3, 4, 23, 3), True, 256, 4): "resnext101_64x4d",
    ((3, 4, 6, 3), True, 128, 128): "wide_resnet50_2",
    ((3, 4, 23, 3), True, 128, 128): "wide_resnet101_2",
}


def load_backbone(backbone: nn.Module, source: str, sha256: str | None = None) -> list[str]:
    """Copy an ImageNet checkpoint (ResNet or ResNeXt) into a backbone, its classifier left out.

    Args:
        backbone: has torchvision's parameter names: conv1, bn1, layer1.0.conv1, ...
        source: a file of torchvision, detectron2 or Caffe2 (R-50.pkl), or a URL that is fetched once into
            torch.hub's cache.
        sha256: expected hash or its first digits (8 or more). None: what the file's name says of its hash.

    Returns:
        Lines that say what was chosen of the file and what left out, if anything was.
    Raises:
        UserError: missing, incomplete, of another hash or of another architecture. The backbone is
            unchanged then.
    """
    path = find_weights(source, sha256, "model.backbone.weights")
    given, lines = as_state(read_weights(path), path)
    state = {key: value for key, value in import_backbone(given).items() if not key.startswith("fc.")}
    own = backbone.state_dict()
    state = with_counters(state, own)

    found, wanted = backbone_of(state), backbone_of(own)
    if found is None and not state.keys() & own.keys():
        if program_of(given) not in (None, "backbone"):
            raise UserError(f"{path}: holds a whole detector; give it as model.weights instead")
        start = ", ".join(list(given)[:3]) or "none"
        raise UserError(f"{path}: holds no ResNet or ResNeXt backbone; its first keys are {start}")
    if found is not None and wanted is not None and found != wanted:
        raise UserError(f"{path}: holds a {found}, but model.backbone is a {wanted}; change one of the two")
    if has_statistics(state) and not has_statistics(own):
        raise UserError(
            f"{path}: was trained with batch normalisation, and model.backbone.norm has no place for its "
            "statistics; use frozen_bn, bn or sync_bn, or leave out model.backbone.weights"
        )
    copy_state(backbone, state, path)
    return [f"{path}: {line}" for line in lines]


def backbone_of(state: Mapping[str, Tensor]) -> str | None:
    """Name of the network that a torchvision state dict belongs to; None if it is not a known one."""
    blocks = tuple(
        len({key.split(".")[1] for key in state if key.startswith(f"layer{stage}.")}) for stage in range(1, 5)
    )
    stem, first = state.get("conv1.weight"), state.get("layer1.0.conv2.weight")
    if stem is None or first is None or stem.dim() != 4 or first.dim() != 4:
        return None
    width = stem.shape[0]
    filters, reads = (64 * size // width for size in first.shape[:2])
    name = _NETWORKS.get((blocks, "layer1.0.conv3.weight" in state, filters, reads))
    if name is None:
        return None
    return name if width == 64 else f"{name} with a stem of {width} channels"


def as_state(tree: Any, path: str | Path, *, cast: bool = False) -> tuple[dict[str, Tensor], list[str]]:
    """A dict of float32 tensors by name, on the CPU, from what a file holds; and lines as `unwrap` has them.

    Args:
        cast: turn other floating-point types into float32.
    Raises:
        UserError: it is something else; what, is said.
    """
    state, lines = unwrap(tree, path)

    def require(faulty: Iterable[str], what: str, remedy: str) -> None:
        if keys := list(faulty):
            raise UserError(f"{path}: {len(keys)} of {len(state)} tensors, {keys[0]} first, {what}; {remedy}")

    away = {key: value.device for key, value in state.items() if value.device.type != "cpu"}
    where = ", ".join(sorted({str(device) for device in away.values()}))
    require(
        away, f"are on another device ({where})", "move the model to the CPU before saving its state_dict()"
    )
    packed = (k for k, v in state.items() if v.layout != torch.strided or v.is_quantized or v.is_complex())
    require(packed, "are sparse, quantised or complex", "save plain float32 tensors")
    if cast:
        state = {key: value.float() if value.is_floating_point() else value for key, value in state.items()}
        return state, lines
    other = {k: v.dtype for k, v in state.items() if v.is_floating_point() and v.dtype != torch.float32}
    types = ", ".join(sorted({str(dtype).removeprefix("torch.") for dtype in other.values()}))
    require(
        other,
        f"are {types}, expected float32",
        "save them as float32, as python -m fastmrcnn.convert IN OUT --cast does",
    )
    return state, lines


class Mismatch(NamedTuple):
    """How a state dict differs from the one that is wanted."""

    missing: list[str]
    unexpected: list[str]
    reshaped: list[str]

    def __bool__(self) -> bool:
        return any(self)


def compare_states(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> Mismatch:
    return Mismatch(
        [key for key in own if key not in state],
        [key for key in state if key not in own],
        [
            key
            for key in own
            if key in state
            and (
                own[key].shape != state[key].shape
                or own[key].is_floating_point() != state[key].is_floating_point()
            )
        ],
    )


def describe_mismatch(
    found: Mismatch,
    state: Mapping[str, Tensor],
    own: Mapping[str, Tensor],
    names: Mapping[str, str] | None = None,
) -> str:
    """Every key on one line, in groups.

    Args:
        names: what the file calls a key, where it has another name.
    """
    parts = []
    if found.missing:
        parts.append(f"missing ({len(found.missing)}): {grouped(found.missing)}")
    if found.unexpected:
        theirs = [names.get(key, key) if names else key for key in found.unexpected]
        parts.append(f"unexpected ({len(theirs)}): {grouped(theirs)}")
    if found.reshaped:
        shapes = (
            f"{key} {shape_of(state[key])} in the file, {shape_of(own[key])} in the model"
            for key in found.reshaped
        )
        parts.append(f"of another shape ({len(found.reshaped)}): {', '.join(shapes)}")
    return "; ".join(parts)


def shape_of(tensor: Tensor) -> str:
    """Its shape, and its type if that is not a float."""
    return f"{tuple(tensor.shape)}" + ("" if tensor.is_floating_point() else f" {tensor.dtype}")


def copy_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy every tensor of `state` into `module`, or none.

    Raises:
        UserError: lists every key that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    if found := compare_states(state, own):
        raise UserError(f"{source}: does not fit the model: {describe_mismatch(found, state, own)}")
    module.load_state_dict(state)


def with_counters(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`state` with the same num_batches_tracked as `own` has.

    Only BatchNorm2d with momentum=None reads these counters; old files and frozen norms lack them.
    """
    counters = {key for key in own if key.endswith(COUNTER)}
    kept = {k: v for k, v in state.items() if not k.endswith(COUNTER) or k in counters}
    return {**{key: own[key] for key in counters}, **kept}


def has_statistics(state: Iterable[str]) -> bool:
    return any(key.endswith(".running_mean") for key in state)
