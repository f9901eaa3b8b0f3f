"""The model that a run starts with: new, or from another one's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import last_stage
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.detectors import open_weights, prepared, require_constants
from fastmrcnn.weights.peers.programs import grouped
from fastmrcnn.weights.peers.rows import class_count
from fastmrcnn.weights.states import compare_states, describe_mismatch, load_backbone
from fastmrcnn.weights.trained import untrained_model
from fastmrcnn.weights.zoo import kind_of

# What depends on the number of classes, or of keypoints.
_OF_CLASSES = ("box_head.classes.", "box_head.deltas.", "mask_head.predictor.")
_OF_KEYPOINTS = "keypoint_head.deconv."


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
            class_names=card.class_names,
        )
        print(*lines, sep="\n")
    else:
        load_imagenet(model, config)


def load_imagenet(model: MaskRCNN, config: ModelConfig) -> None:
    """Load what `model.backbone.weights` names, if anything, into the backbone and a C4 model's last stage.

    Raises:
        UserError: as `load_backbone`.
    """
    if config.backbone.weights is None:
        return
    backbone: nn.Module = model.backbone
    if config.architecture == "c4":  # the same modules under the names that an ImageNet checkpoint has
        backbone = nn.Module()
        for name, child in model.backbone.named_children():
            backbone.add_module(name, child)
        backbone.add_module("layer4", model.res5 or last_stage(config))
    load_backbone(backbone, config.backbone.weights, config.backbone.weights_sha256)


def load_weights(
    model: MaskRCNN,
    source: str,
    sha256: str | None = None,
    *,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Start a model from another one's weights.

    With another number of classes (or of keypoints) the last predictors stay as they are, and everything
    else is loaded.

    Args:
        strict: whatever else does not fit is an error that lists every key; else it is left out.
        class_names: of the model's classes.
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

    predictors = [key for key in state if key in own and _is_predictor(key) and _other_count(key, state, own)]
    rest = {key: value for key, value in state.items() if key not in predictors}
    wanted = {key: value for key, value in own.items() if key not in predictors}
    mismatch = compare_states(rest, wanted)
    if mismatch and strict:
        found, built = kind_of(state), kind_of(own)
        if found != built:
            raise UserError(
                f"{path}: holds a {found} ({imported.program}), but the configuration builds a {built}; take "
                "that model's recipe in configs/zoo/, or model.weights_strict=false for the parts that fit"
            )
        text = describe_mismatch(mismatch, rest, wanted, imported.names)
        raise UserError(f"{path}: does not fit the model: {text}; model.weights_strict=false leaves them out")
    fitting = {k: v for k, v in rest.items() if k in wanted and k not in mismatch.reshaped}
    model.load_state_dict({**own, **fitting})

    lines = [
        f"Starting from {path}: {len(fitting)} of {len(own)} tensors ({imported.program}, {kind_of(state)})"
    ]
    if predictors:
        theirs = class_count(state)
        reason = f"has {theirs} classes and this model {num_classes}"
        if theirs == num_classes:
            reason = "has another number of keypoints"
        lines.append(f"Left out, since the file {reason}: {grouped(predictors)}")
    elif file.card is not None and class_names not in (None, file.card.class_names):
        lines.append(f"Its classes were, in this order: {', '.join(file.card.class_names)}")
    if mismatch:
        lines.append(
            f"Left out, since they do not fit: {describe_mismatch(mismatch, rest, wanted, imported.names)}"
        )
    if imported.homeless:
        lines.append(f"Left out, since no model here has them: {grouped(imported.homeless)}")
    return lines


def _is_predictor(key: str) -> bool:
    return key.startswith((*_OF_CLASSES, _OF_KEYPOINTS))


def _other_count(key: str, state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> bool:
    """Whether two predictors differ by their number of classes or keypoints, and by nothing else."""
    axis = 1 if key == f"{_OF_KEYPOINTS}weight" else 0
    ours, theirs = list(own[key].shape), list(state[key].shape)
    if len(ours) != len(theirs) or ours == theirs:
        return False
    del ours[axis], theirs[axis]
    return ours == theirs
