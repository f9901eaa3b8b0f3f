"""The model that a run starts with: new, or from another one's weights."""

from __future__ import annotations

import torch
from torch import nn

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import last_stage
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.model.timm_backbone import TimmBackbone
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.detectors import open_weights, prepared, require_constants
from fastmrcnn.weights.peers.class_rows import class_count
from fastmrcnn.weights.peers.programs import grouped
from fastmrcnn.weights.predictors import take_predictors
from fastmrcnn.weights.states import compare_states, describe_mismatch, load_backbone
from fastmrcnn.weights.timm_weights import load_timm_weights
from fastmrcnn.weights.trained import untrained_model
from fastmrcnn.weights.zoo import architecture_of


def new_model(card: ModelCard, device: torch.device) -> MaskRCNN:
    """A model to be trained, with random weights, in the memory format that suits the device."""
    # On a GPU channels_last is the fast layout; on a CPU it is no faster and batch norm loses digits.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return untrained_model(card).to(device, memory_format=layout).train()  # type: ignore[call-overload]


def load_start(model: MaskRCNN, card: ModelCard) -> None:
    """Load what a run starts from: a whole detector (`model.weights`), else an ImageNet backbone, if any.

    Of a detector it is printed what was loaded and what was left out.
    """
    config = card.config.model
    if config.weights is not None:
        lines = load_weights(
            model,
            config.weights,
            config.weights_sha256,
            strict=config.weights_strict,
            card=card,
        )
        print(*lines, sep="\n")
    else:
        load_imagenet(model, config)


def load_imagenet(model: MaskRCNN, config: ModelConfig) -> None:
    """Load what `model.backbone.weights` names, if anything, into the backbone and a C4 model's last stage.

    Raises:
        UserError: as `load_backbone` and `load_timm_weights`.
    """
    source, sha256 = config.backbone.weights, config.backbone.weights_sha256
    if source is None:
        return
    if isinstance(model.backbone, TimmBackbone):
        print(*load_timm_weights(model.backbone, source, sha256), sep="\n")
        return
    backbone: nn.Module = model.backbone
    if config.architecture == "c4":  # the same modules under the names that an ImageNet checkpoint has
        backbone = nn.Module()
        for name, child in model.backbone.named_children():
            backbone.add_module(name, child)
        backbone.add_module("layer4", model.res5 or last_stage(config))
    for line in load_backbone(backbone, source, sha256):
        print(line)


def load_weights(
    model: MaskRCNN,
    source: str,
    sha256: str | None = None,
    *,
    strict: bool = True,
    card: ModelCard | None = None,
) -> list[str]:
    """Start a model from another one's weights.

    Classes and keypoints take over what belongs to those of the same name in the last predictors, as
    `take_predictors` has it, and everything else is loaded.

    Args:
        strict: whatever else does not fit is an error that lists every key; else it is left out.
        card: of the model; None: its classes and keypoints have no names.
    Returns:
        Lines that say what was loaded and what was left out.
    Raises:
        UserError: as `open_weights`; or the weights do not fit. The model is unchanged then.
    """
    own = model.state_dict()
    num_classes = class_count(own)
    file = open_weights(source, sha256, num_classes=num_classes, strict=strict)
    path, imported = file.path, file.imported
    if strict:
        require_constants(imported.constants, model, path)
    state = prepared(imported, own)

    predictors = take_predictors(state, model, card, file.card)
    settled = {*predictors.given, *predictors.left}
    rest = {key: value for key, value in state.items() if key not in settled}
    wanted = {key: value for key, value in own.items() if key not in settled}
    mismatch = compare_states(rest, wanted)
    if mismatch and strict:
        found, built = architecture_of(state), architecture_of(own)
        if found != built:
            raise UserError(
                f"{path}: holds a {found} ({imported.program}), but the configuration builds a {built}; take "
                "that model's recipe in configs/zoo/, or model.weights_strict=false for the parts that fit"
            )
        text = describe_mismatch(mismatch, rest, wanted, imported.names)
        raise UserError(f"{path}: does not fit the model: {text}; model.weights_strict=false leaves them out")
    fitting = {k: v for k, v in rest.items() if k in wanted and k not in mismatch.reshaped}
    model.load_state_dict({**own, **fitting, **predictors.given})

    what = f"{imported.program}, {architecture_of(state)}"
    whole = len(fitting) + len(predictors.given.keys() - predictors.partly)
    part = f" and {len(predictors.partly)} in part" if predictors.partly else ""
    lines = [f"Starting from {path}: {whole} of {len(own)} tensors{part} ({what})", *file.lines]
    lines += predictors.lines
    if mismatch:
        lines.append(
            f"Left out, since they do not fit: {describe_mismatch(mismatch, rest, wanted, imported.names)}"
        )
    if imported.homeless:
        lines.append(f"Left out, since no model here has them: {grouped(imported.homeless)}")
    return lines
