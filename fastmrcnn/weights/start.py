"""The model that a run starts with: new, or from another one's weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fastmrcnn.config.schema import ModelConfig
from fastmrcnn.errors import UserError
from fastmrcnn.model.build import build_model
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.detectors import _OF_CLASSES, _OF_KEYPOINTS, open_detector, prepared, require_constants
from fastmrcnn.weights.peers.programs import grouped
from fastmrcnn.weights.peers.rows import class_count
from fastmrcnn.weights.states import compare_states, describe_mismatch
from fastmrcnn.weights.zoo import kind_of


def new_model(card: ModelCard, device: torch.device, *, imagenet: bool, detector: bool) -> MaskRCNN:
    """A model to be trained, in the memory format that suits the device.

    Args:
        imagenet: load model.backbone.weights.
        detector: load model.weights, and print what was loaded.
    """
    model = build_model(
        card.config.model,
        len(card.class_names),
        load_backbone_weights=imagenet,
        num_keypoints=card.num_keypoints,
    )
    if detector:
        start_model(model, card.config.model, card.class_names)
    # On a GPU channels_last is the fast layout; on a CPU it is no faster and batch norm loses digits.
    layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
    return model.to(device, memory_format=layout).train()  # type: ignore[call-overload]


def start_model(model: MaskRCNN, config: ModelConfig, class_names: Sequence[str] | None = None) -> None:
    """Load what `model.weights` names, if anything, and print what was loaded and what was left out."""
    if config.weights is not None:
        lines = load_detector(
            model,
            config.weights,
            config.weights_sha256,
            strict=config.weights_strict,
            class_names=class_names,
        )
        print(*lines, sep="\n")


def load_detector(
    model: MaskRCNN,
    source: str,
    sha256: str | None = None,
    *,
    strict: bool = True,
    class_names: Sequence[str] | None = None,
) -> list[str]:
    """Start a model from another one's weights, on the CPU.

    With another number of classes (or of keypoints) the last predictors stay as they are, and everything
    else is loaded.

    Args:
        strict: whatever else does not fit is an error that lists every key; else it is left out.
        class_names: of the model's classes.
    Returns:
        Lines that say what was loaded and what was left out.
    Raises:
        UserError: as `open_detector`; or the weights do not fit. The model is unchanged then.
    """
    own = model.state_dict()
    num_classes = class_count(own)
    detector = open_detector(source, sha256, num_classes=num_classes, strict=strict)
    path, imported = detector.path, detector.imported
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
    elif detector.card is not None and class_names not in (None, detector.card.class_names):
        lines.append(f"Its classes were, in this order: {', '.join(detector.card.class_names)}")
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
