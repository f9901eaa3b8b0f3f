"""Whole detectors from files: our checkpoints, and state dicts of torchvision and detectron2.

A detector's weights serve in two ways: `load_detector` starts a run from them, `as_model` makes them a
model with the configuration that gives the numbers of the program they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.keypoints import COCO_PERSON, schema_of_weights
from fastmrcnn.device import choose_device
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard, card_of, read_card
from fastmrcnn.weights.checkpoint import check_format, find_checkpoint, is_checkpoint
from fastmrcnn.weights.files import find_weights, is_url, read_weights
from fastmrcnn.weights.peers.classes import ClassTable, known_classes, numbered_classes
from fastmrcnn.weights.peers.programs import Imported, import_state, with_statistics
from fastmrcnn.weights.peers.rows import class_count
from fastmrcnn.weights.states import as_state, copy_state, has_statistics, with_counters
from fastmrcnn.weights.zoo import kind_of, published_recipe

# What depends on the number of classes, or of keypoints.
_OF_CLASSES = ("box_head.classes.", "box_head.deltas.", "mask_head.predictor.")
_OF_KEYPOINTS = "keypoint_head.deconv."
SPARE = "torchvision_rows"  # in a checkpoint's extra: what the way back to torchvision needs


class Detector(NamedTuple):
    """A file's weights, under our names."""

    path: Path
    imported: Imported
    card: ModelCard | None  # of our own checkpoints
    step: int


def open_detector(
    source: str | Path,
    sha256: str | None = None,
    *,
    num_classes: int | None = None,
    strict: bool = True,
    cast: bool = False,
) -> Detector:
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
    if not is_url(str(source)) and Path(source).expanduser().is_dir():
        source = find_checkpoint(source)
    path = find_weights(source, sha256, "model.weights")
    tree = read_weights(path)
    if not is_checkpoint(tree):
        state = as_state(tree, path, cast=cast)
        return Detector(path, import_state(state, path, num_classes, strict=strict), None, 0)
    checkpoint = check_format(tree, path)
    weights = checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"]
    imported = import_state(as_state(weights, path, cast=cast), path, strict=strict)
    imported = imported._replace(spare=dict(checkpoint["extra"].get(SPARE) or {}))
    return Detector(path, imported, read_card(checkpoint, path), int(checkpoint["step"]))


def prepared(imported: Imported, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights with the bookkeeping of normalisation layers that the model has."""
    state = with_counters(imported.state, own)
    if imported.program == "detectron2" and has_statistics(own) and not has_statistics(state):
        state = with_statistics(state)  # early files have scale and shift only
    return state


def require_constants(constants: Mapping[str, Tensor], model: MaskRCNN, path: Path) -> None:
    """UserError unless the pixel statistics and anchors in a detectron2 file are those of the model."""
    faults = []
    for key, value in constants.items():
        name = key.rpartition(".")[2]
        if key in ("pixel_mean", "pixel_std"):
            ours, place = getattr(model, key).flatten(), f"model.{key}"
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


def as_model(
    detector: Detector, config: Config | None = None, classes: ClassTable | None = None
) -> tuple[MaskRCNN, list[str]]:
    """The model, on the CPU, in eval mode and with its card; and lines that say what was decided.

    Args:
        config: of the model; none: the recipe of the published model that the weights look like.
        classes: names and ids; none: those of COCO for 80 classes, "person" for a keypoint model's one, else
            numbers.
    Raises:
        UserError: the recipe is not known; or the weights do not fit the configuration.
    """
    path, imported = detector.path, detector.imported
    kind = kind_of(imported.state)
    lines = [f"{path}: {imported.program}, {kind}"]
    if detector.card is not None:
        config, known = config or detector.card.config, detector.card
        classes = classes or ClassTable(known.class_names, known.category_ids)
    if config is None:
        config, recipe = published_recipe(imported, kind, path)
        lines.append(f"configuration: configs/zoo/{recipe}.yaml")
    count = class_count(imported.state)
    if classes is None:
        classes = known_classes(count or 0, kind.keypoints)
    if classes is None:
        classes = numbered_classes(count or 0)
        lines.append(
            "the file does not tell the names of its classes; "
            "python -m fastmrcnn.convert IN OUT --classes FILE gives them"
        )
    if len(classes.names) != count:
        raise UserError(f"{path}: has {count} classes, but {len(classes.names)} names were given")
    keypoints = None
    if kind.keypoints:
        known_ones = None if detector.card is None else detector.card.keypoints
        keypoints = known_ones or schema_of_weights(imported.state[f"{_OF_KEYPOINTS}weight"].shape[1])
    model = build_model(
        config.model,
        len(classes.names),
        load_backbone_weights=False,
        # Where the weights have no keypoints, any number will do: what is wrong is told below.
        num_keypoints=len((keypoints or COCO_PERSON).names),
    )
    require_constants(imported.constants, model, path)
    state = prepared(imported, model.state_dict())
    built = kind_of(model.state_dict())
    if built != kind:
        raise UserError(
            f"{path}: holds a {kind} ({imported.program}), but the configuration builds a {built}; give the "
            "recipe of that model as --config"
        )
    copy_state(model, state, path)
    start = config.model.model_copy(update={"weights": None, "weights_sha256": None})
    named = config.model_copy(update={"model": start})
    card = ModelCard(named, list(classes.names), list(classes.ids), keypoints)
    lines.append(f"classes: {_listed(classes.names)}")
    model.card = card
    return model.eval(), lines


def load_recipe(path: str, device: str, overrides: Sequence[str]) -> tuple[MaskRCNN, Config]:
    """The model of a recipe's `model.weights`, ready for detection, and its configuration.

    Raises:
        UserError: the recipe names no weights; or as `open_detector` and `as_model`.
    """
    config = load_config(path, overrides)
    place = choose_device(device)
    if config.model.weights is None:
        raise UserError(f"{path}: names no model.weights to judge; give model.weights=FILE, or --checkpoint")
    detector = open_detector(config.model.weights, config.model.weights_sha256)
    model, lines = as_model(detector, config)
    print(*lines, sep="\n")
    return model.to(place), config


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... ({len(names)})"


def load_checkpoint(path: str | Path, device: str | torch.device = "auto") -> MaskRCNN:
    """A trained model, ready for detection: in eval mode, on `device`, with its `card` set.

    The averaged weights (EMA) are taken if the run kept them.

    Args:
        path: as in `find_checkpoint`; or a published detector of torchvision or detectron2, a file or a
            URL, which is read with its recipe in configs/zoo/.
    Raises:
        UserError: as `read_checkpoint`; or the weights do not fit; or there is no such device.
    """
    place = choose_device(str(device))
    if not is_url(str(path)):
        file = find_checkpoint(path)
        tree = read_weights(file)
        if is_checkpoint(tree):
            return model_of(check_format(tree, file), file).to(place)

    model, lines = as_model(open_detector(path))
    print("\n".join(lines))
    return model.to(place)


def model_of(checkpoint: Mapping[str, Any], source: str | Path) -> MaskRCNN:
    """The model that `read_checkpoint` read, on the CPU, in eval mode, with its card."""
    card = read_card(checkpoint, source)
    model = build_model(
        card.config.model,
        len(card.class_names),
        load_backbone_weights=False,
        num_keypoints=card.num_keypoints,
    )
    weights = checkpoint["model"] if checkpoint["ema"] is None else checkpoint["ema"]
    copy_state(model, as_state(weights, source), source)
    model.card = card
    return model.eval()


def load_overridden(checkpoint: str, device: str, overrides: Sequence[str]) -> tuple[MaskRCNN, Config]:
    """The model of a checkpoint, and its configuration with `key=value` changes, in effect in the model."""
    model = load_checkpoint(checkpoint, device)
    card = card_of(model)
    config = load_config(overrides=overrides, base=card.config.model_dump(mode="json"))
    if config.model.weights != card.config.model.weights:
        raise UserError("model.weights goes with --config; --checkpoint brings weights of its own")
    if config.model != card.config.model:
        changed = build_model(
            config.model,
            len(card.class_names),
            load_backbone_weights=False,
            num_keypoints=card.num_keypoints,
        )
        copy_state(changed, model.state_dict(), checkpoint)
        changed.card = card
        model = changed.to(next(model.parameters()).device).eval()
    return model, config
