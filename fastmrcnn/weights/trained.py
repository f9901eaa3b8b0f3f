"""Trained models: one way from weights to a model, whatever file they stand in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastmrcnn.config.file import load_config
from fastmrcnn.config.schema import Config
from fastmrcnn.data.keypoints import COCO_PERSON, schema_of_weights
from fastmrcnn.device import choose_device
from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard, read_card
from fastmrcnn.weights.checkpoint import check_format, find_checkpoint, judged_weights
from fastmrcnn.weights.detectors import WeightsFile, open_weights, prepared, require_constants
from fastmrcnn.weights.exported import ExportedModel, is_exported, load_exported
from fastmrcnn.weights.peers.class_rows import class_count, keypoint_count
from fastmrcnn.weights.peers.classes import ClassTable, known_classes, numbered_classes
from fastmrcnn.weights.peers.programs import Imported
from fastmrcnn.weights.sources import is_url
from fastmrcnn.weights.states import as_state, copy_state
from fastmrcnn.weights.whole import is_checkpoint, read_whole
from fastmrcnn.weights.zoo import architecture_of, published_recipe

Trained = TypeVar("Trained", bound="TrainedModel")


@dataclass(frozen=True)
class TrainedModel:
    """A model in eval mode, and what it was trained with."""

    model: nn.Module  # a MaskRCNN, or an ExportedModel in its place
    card: ModelCard  # its configuration is the one that the model was built from

    def to(self: Trained, device: str | torch.device) -> Trained:
        """The same one, its model moved. Raises UserError if there is no such device."""
        self.model.to(choose_device(str(device)))
        return self


def untrained_model(card: ModelCard) -> MaskRCNN:
    """The model that a card describes, on the CPU, with random weights."""
    return build_model(card.config.model, len(card.class_names), card.num_keypoints)


def restored_model(
    card: ModelCard, weights: Mapping[str, Tensor] | Imported, source: str | Path
) -> TrainedModel:
    """The model that a card describes, on the CPU, with these weights.

    Args:
        weights: what the model's state dict is to be; or another program's, which may lack the bookkeeping
            of normalisation layers.
        source: of the weights, for messages.
    Raises:
        UserError: the weights do not fit the card's configuration.
    """
    model = untrained_model(card)
    if isinstance(weights, Imported):
        require_constants(weights.constants, model, source)
        own = model.state_dict()
        found, built = architecture_of(weights.state), architecture_of(own)
        if found != built:
            raise UserError(
                f"{source}: holds a {found} ({weights.program}), but the configuration builds a {built}; "
                "give the recipe of that model as --config"
            )
        weights = prepared(weights, own)
    copy_state(model, weights, source)
    return TrainedModel(model.eval(), card)


def load_trained(path: str | Path, device: str | torch.device = "auto") -> TrainedModel:
    """A trained model on `device`, with the averaged weights (EMA) if the run kept them.

    Args:
        path: as in `find_checkpoint`; or a published detector of torchvision or detectron2, a file or a
            URL, which is read with its recipe in configs/zoo/, and what was decided is printed; or a file
            of `python -m fastmrcnn.export`.
    Raises:
        UserError: as `read_checkpoint`; or the weights do not fit; or there is no such device.
    """
    if is_exported(path) and not is_url(str(path)):
        return TrainedModel(*load_exported(expanded(path), str(device)))
    place = choose_device(str(device))
    if not is_url(str(path)):
        file = find_checkpoint(path)
        tree = read_whole(file)
        if is_checkpoint(tree):
            checkpoint = check_format(tree, file)
            weights, _ = as_state(judged_weights(checkpoint), file)
            return restored_model(read_card(checkpoint, file), weights, file).to(place)
    trained, lines = as_trained(open_weights(path))
    print(*lines, sep="\n")
    return trained.to(place)


def load_overridden(checkpoint: str, device: str, overrides: Sequence[str]) -> TrainedModel:
    """As `load_trained`, with `key=value` changes of the configuration, which are in effect in the model."""
    trained = load_trained(checkpoint, device)
    before = trained.card.config
    config = load_config(overrides=overrides, base=before.model_dump(mode="json"))
    if config.model.weights != before.model.weights:
        raise UserError("model.weights goes with --config; --checkpoint brings weights of its own")
    card = replace(trained.card, config=config)
    if config.model == before.model:
        return replace(trained, card=card)
    if isinstance(trained.model, ExportedModel):
        raise UserError(
            f"{checkpoint}: is exported, with the settings of its model in it; give these to "
            "python -m fastmrcnn.export, with the run that it was made of"
        )
    place = next(trained.model.parameters()).device
    return restored_model(card, trained.model.state_dict(), checkpoint).to(place)


def load_recipe(path: str, device: str, overrides: Sequence[str]) -> TrainedModel:
    """The model of a recipe's `model.weights`; what was decided on reading them is printed.

    Raises:
        UserError: the recipe names no weights; or as `open_weights` and `as_trained`.
    """
    config = load_config(path, overrides)
    place = choose_device(device)
    if config.model.weights is None:
        raise UserError(f"{path}: names no model.weights to judge; give model.weights=FILE, or --checkpoint")
    trained, lines = as_trained(open_weights(config.model.weights, config.model.weights_sha256), config)
    print(*lines, sep="\n")
    return trained.to(place)


def as_trained(
    file: WeightsFile, config: Config | None = None, classes: ClassTable | None = None
) -> tuple[TrainedModel, list[str]]:
    """The model of a file's weights, on the CPU; and lines that say what was decided.

    Args:
        config: of the model; None: the checkpoint's own, or the recipe of the published model that the
            weights look like.
        classes: names and ids; None: the checkpoint's own; or those of COCO for 80 classes, "person" for a
            keypoint model's one, else numbers.
    Raises:
        UserError: the recipe is not known; or the weights do not fit the configuration.
    """
    path, imported, known = file.path, file.imported, file.card
    architecture = architecture_of(imported.state)
    lines = [f"{path}: {imported.program}, {architecture}", *file.lines]
    if known is not None:
        config = config or known.config
        classes = classes or ClassTable(known.class_names, known.category_ids)
    if config is None:
        config, recipe = published_recipe(imported, architecture, path)
        lines.append(f"configuration: configs/zoo/{recipe}.yaml")
    count = class_count(imported.state)
    if classes is None:
        classes = known_classes(count or 0, architecture.keypoints)
    if classes is None:
        classes = numbered_classes(count or 0)
        lines.append(
            "the file does not tell the names of its classes; "
            "python -m fastmrcnn.convert IN OUT --classes FILE gives them"
        )
    if len(classes.names) != count:
        raise UserError(f"{path}: has {count} classes, but {len(classes.names)} names were given")
    keypoints = None if known is None else known.keypoints
    if (number := keypoint_count(imported.state)) is not None:
        keypoints = keypoints or schema_of_weights(number)
    else:  # any will do where the configuration has a keypoint head: that the weights have none is told below
        keypoints = COCO_PERSON if config.model.keypoint_head.enabled else None
    start = config.model.model_copy(update={"weights": None, "weights_sha256": None})
    config = config.model_copy(update={"model": start})
    card = ModelCard(config, list(classes.names), list(classes.ids), keypoints)
    lines.append(f"classes: {_listed(classes.names)}")
    return restored_model(card, imported, path), lines


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:3])}, ... ({len(names)})"
