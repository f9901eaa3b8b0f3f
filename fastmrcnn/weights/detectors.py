"""Whole detectors in files: our checkpoints, and state dicts of torchvision and detectron2.

Their weights serve in two ways: start.py starts a run from them, trained.py makes them a model that detects.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.checkpoint import check_format, find_checkpoint, judged_weights
from fastmrcnn.weights.peers.programs import Imported, import_state, with_statistics
from fastmrcnn.weights.sources import find_weights, is_url
from fastmrcnn.weights.states import as_state, has_statistics, with_counters
from fastmrcnn.weights.whole import is_checkpoint, read_whole

SPARE = "torchvision_rows"  # in a checkpoint's extra: what the way back to torchvision needs


class WeightsFile(NamedTuple):
    """A detector's weights as a file has them, under our names."""

    path: Path
    imported: Imported
    card: ModelCard | None  # of our own checkpoints
    step: int
    lines: list[str]  # that say what was chosen of what the file holds


def open_weights(
    source: str | Path,
    sha256: str | None = None,
    *,
    num_classes: int | None = None,
    strict: bool = True,
    cast: bool = False,
) -> WeightsFile:
    """Read a detector's weights.

    Args:
        source: a file, a URL, or the folder of one of our runs (its last checkpoint).
        sha256: as in `find_weights`.
        num_classes: as in `import_state`.
        strict: parts that no model here has are an error; else they are left out.
        cast: turn other floating-point types into float32.
    Raises:
        UserError: it cannot be had, is damaged, wants to run code, or holds something else.
    """
    if not is_url(str(source)) and expanded(source).is_dir():
        source = find_checkpoint(source)
    path = find_weights(source, sha256, "model.weights")
    tree = read_whole(path)
    if not is_checkpoint(tree):
        state, lines = as_state(tree, path, cast=cast)
        return WeightsFile(path, import_state(state, path, num_classes, strict=strict), None, 0, lines)
    checkpoint = check_format(tree, path)
    state, lines = as_state(judged_weights(checkpoint), path, cast=cast)
    imported = import_state(state, path, strict=strict)
    imported = imported._replace(spare=dict(checkpoint["extra"].get(SPARE) or {}))
    return WeightsFile(path, imported, read_card(checkpoint, path), int(checkpoint["step"]), lines)


def prepared(imported: Imported, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the bookkeeping of normalisation layers that the model has."""
    state = with_counters(imported.state, own)
    if imported.program == "detectron2" and has_statistics(own) and not has_statistics(state):
        state = with_statistics(state)  # early files have scale and shift only
    return state


def require_constants(constants: Mapping[str, Tensor], model: MaskRCNN, path: str | Path) -> None:
    """UserError unless the pixel statistics and anchors in a detectron2 file are those of the model."""
    faults = []
    for key, value in constants.items():
        name = key.rpartition(".")[2]
        if key in ("pixel_mean", "pixel_std"):
            ours, place = getattr(model, key).flatten().cpu(), f"model.{key}"
        else:
            if model.rpn is None or int(name) >= len(model.rpn.anchors.base):
                continue
            ours, place = torch.tensor(model.rpn.anchors.base[int(name)]).flatten(), "model.anchors"
        theirs = value.float().flatten()
        if theirs.shape != ours.shape or not torch.allclose(theirs, ours, rtol=1e-3, atol=1e-2):
            shown = [round(number, 3) for number in theirs.tolist()]
            faults.append(f"{key} is {shown}, {place} gives {[round(n, 3) for n in ours.tolist()]}")
    if faults:
        raise UserError(
            f"{path}: was trained with other settings: {'; '.join(faults)}; take the recipe of that model in "
            "configs/zoo/, or set them"
        )
