"""Weights from files: read without running code, checked before anything is copied."""

from __future__ import annotations

import hashlib
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from torch import Tensor, nn

from fastmrcnn.errors import UserError

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


def load_backbone(backbone: nn.Module, source: str, sha256: str | None = None) -> None:
    """Copy a torchvision ImageNet checkpoint (ResNet or ResNeXt) into a backbone, its `fc` left out.

    Args:
        backbone: has torchvision's parameter names: conv1, bn1, layer1.0.conv1, ...
        source: a file, or a URL that is fetched once into torch.hub's cache.
        sha256: expected hash or its first digits (8 or more). None: the digits at the end of the
            file's name, as in resnet50-0676ba61.pth, if there are any.

    Raises:
        UserError: missing, incomplete, of another hash or of another architecture. The backbone is
            unchanged then.
    """
    expected = _expected_digits(source, sha256)
    path = _fetch(source, expected) if _is_url(source) else Path(source).expanduser()
    _check_digits(path, expected)
    state = as_state(read_tensors(path), path)
    own = backbone.state_dict()

    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    # A counter that only BatchNorm2d with momentum=None reads; old files and frozen norms lack it.
    for key in {key for key in (*state, *own) if key.endswith(".num_batches_tracked")}:
        if key not in own:
            del state[key]
        elif key not in state:
            state[key] = own[key]

    found, wanted = architecture(state), architecture(own)
    if found is None and not state.keys() & own.keys():
        start = ", ".join(list(state)[:3]) or "none"
        raise UserError(
            f"{path}: holds no torchvision ResNet or ResNeXt backbone; its first keys are {start}"
        )
    if found is not None and wanted is not None and found != wanted:
        raise UserError(f"{path}: holds a {found}, but model.backbone is a {wanted}; change one of the two")
    if _has_statistics(state) and not _has_statistics(own):
        raise UserError(
            f"{path}: was trained with batch normalisation, and model.backbone.norm has no place for its "
            "statistics; use frozen_bn, bn or sync_bn, or leave out model.backbone.weights"
        )
    copy_state(backbone, state, path)


def architecture(state: Mapping[str, Tensor]) -> str | None:
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


def read_tensors(path: Path) -> Any:
    """What `torch.save` wrote, as tensors and plain containers on the CPU; no code of the file runs.

    Raises:
        UserError: missing, incomplete, not written by torch.save, or with objects other than those.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about formats that are refused below in one line
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, not a file of weights") from None
    except PermissionError:
        raise UserError(f"{path}: may not be read (no permission)") from None
    except (pickle.UnpicklingError, RuntimeError, OSError, EOFError, LookupError, ValueError) as error:
        # torch's own text advises to load it all the same; nobody should.
        foreign = re.search(r"\bGLOBAL ([\w.]+)", str(error))
        # Only of an archive is it known that it is whole, and the name not one that was cut off.
        if foreign and zipfile.is_zipfile(path):
            raise UserError(
                f"{path}: holds pickled code ({foreign[1]}) besides tensors and is not read; save its "
                "state_dict() alone"
            ) from None
        if "TorchScript" in str(error):
            raise UserError(f"{path}: is a TorchScript program; save its state_dict() instead") from None
        raise UserError(
            f"{path}: is incomplete or damaged, or not tensors written by torch.save; fetch or copy it again"
        ) from None


def as_state(tree: Any, path: Path) -> dict[str, Tensor]:
    """`tree` if it is a dict of tensors by name; UserError naming what else it is."""
    if not isinstance(tree, Mapping):
        raise UserError(f"{path}: expected a dict of tensors by name, got a {type(tree).__name__}")
    odd = [str(key) for key, value in tree.items() if not isinstance(value, Tensor)]
    if odd:
        raise UserError(f"{path}: expected a dict of tensors by name; not a tensor: {', '.join(odd)}")
    return {str(key): value for key, value in tree.items()}


def copy_state(module: nn.Module, state: Mapping[str, Tensor], source: str | Path) -> None:
    """Copy every tensor of `state` into `module`, or none.

    Raises:
        UserError: lists every key that is missing, unexpected or of another shape.
    """
    own = module.state_dict()
    problems = []
    if missing := [key for key in own if key not in state]:
        problems.append(f"missing ({len(missing)}): {_grouped(missing)}")
    if unexpected := [key for key in state if key not in own]:
        problems.append(f"unexpected ({len(unexpected)}): {_grouped(unexpected)}")
    if reshaped := [key for key in own if key in state and own[key].shape != state[key].shape]:
        shapes = (
            f"{key} {tuple(state[key].shape)} in the file, {tuple(own[key].shape)} in the model"
            for key in reshaped
        )
        problems.append(f"of another shape ({len(reshaped)}): {', '.join(shapes)}")
    if problems:
        raise UserError(f"{source}: does not fit the model: " + "; ".join(problems))
    module.load_state_dict(state)


def _grouped(keys: Iterable[str]) -> str:
    """conv1.weight, layer1.0.bn1.{weight, bias}"""
    leaves: dict[str, list[str]] = {}
    for key in keys:
        owner, _, leaf = key.rpartition(".")
        leaves.setdefault(owner, []).append(leaf)
    parts = []
    for owner, names in leaves.items():
        inner = names[0] if len(names) == 1 else "{" + ", ".join(names) + "}"
        parts.append(f"{owner}.{inner}" if owner else inner)
    return ", ".join(parts)


def _has_statistics(state: Iterable[str]) -> bool:
    return any(key.endswith(".running_mean") for key in state)


def _is_url(source: str) -> bool:
    return urlparse(source).scheme in {"http", "https", "file"}


def _expected_digits(source: str, sha256: str | None) -> str | None:
    if sha256 is not None:
        if not re.fullmatch(r"[0-9a-fA-F]{8,64}", sha256):
            raise UserError(
                f"model.backbone.weights_sha256: expected 8 to 64 hexadecimal digits, got {sha256!r}"
            )
        return sha256.lower()
    name = Path(urlparse(source).path if _is_url(source) else source).name
    digits = re.search(r"-([0-9a-f]{8,64})\.(?:pth|pt)$", name)
    return digits[1] if digits else None


def _fetch(url: str, digits: str | None) -> Path:
    """The URL's file in torch.hub's cache, fetched if it is not there."""
    name = Path(urlparse(url).path).name
    if not name:
        raise UserError(f"{url}: names no file")
    path = Path(torch.hub.get_dir()) / "checkpoints" / name
    if path.exists():
        return path
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary name, checks the hash, renames.
        torch.hub.download_url_to_file(url, str(path), hash_prefix=digits)
    except RuntimeError as error:
        raise UserError(f"{url}: what came is incomplete or not what its name says ({error})") from None
    except (OSError, ValueError) as error:  # URLError is an OSError
        raise UserError(
            f"{url}: cannot be fetched into {path} ({error}); without a network, put the file there"
        ) from None
    return path


def _check_digits(path: Path, expected: str | None) -> None:
    if expected is None or not path.is_file():
        return
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 22):
            digest.update(block)
    if not digest.hexdigest().startswith(expected):
        raise UserError(
            f"{path}: is incomplete or another file: its sha256 begins with "
            f"{digest.hexdigest()[: len(expected)]}, expected {expected}; delete it and fetch it again"
        )
