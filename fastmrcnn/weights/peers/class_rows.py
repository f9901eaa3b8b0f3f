"""The order of classes in the last predictors.

Here and in detectron2 classes are 0..K-1 and the background is the class scores' last row. torchvision
counts the background as label 0 in every predictor, and its COCO models label an object with COCO's id,
which leaves ten of their 91 labels without a class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from fastmrcnn.weights.peers.classes import COCO, COCO_LABELS

# How many rows a class has in each predictor. The background has rows in all of torchvision's.
_ROWS = {"box_head.classes": 1, "box_head.deltas": 4, "mask_head.predictor": 1}
_NEVER = -1e4  # a logit that leaves no probability, in float16 too


def torchvision_labels(labels: int, num_classes: int | None = None) -> list[int]:
    """torchvision's label of each class of a model with `labels` labels, the background included.

    Args:
        num_classes: how many classes are wanted; None: 80 of 91 labels, else all but the background.
    """
    if labels == COCO_LABELS + 1 and num_classes != COCO_LABELS:
        return list(COCO.ids)
    return list(range(1, labels))


def from_torchvision(
    state: Mapping[str, Tensor], num_classes: int | None = None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Reorder the predictors of a state dict that has our names and torchvision's rows.

    Returns:
        The state dict with our rows, and the rows that no class has, by parameter: of the background and
        of unused labels. With them the way back is exact.
    """
    ours, spare = dict(state), {}
    for key, value in state.items():
        rows = _ROWS.get(key.rpartition(".")[0])
        if rows is None:
            continue
        by_label = value.unflatten(0, (-1, rows))
        taken = _taken(key, torchvision_labels(len(by_label), num_classes))
        left = [label for label in range(len(by_label)) if label not in taken]
        ours[key] = by_label[taken].flatten(0, 1)
        spare[key] = by_label[left].flatten(0, 1)
    return ours, spare


def to_torchvision(
    state: Mapping[str, Tensor], category_ids: Sequence[int], spare: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Inverse of `from_torchvision`.

    Args:
        category_ids: of the classes. COCO's 80 get 91 labels, others 1..K.
        spare: as it gave them; where they do not fit, an unused label gets no probability.
    """
    count = len(category_ids)
    labels = list(COCO.ids) if list(category_ids) == COCO.ids else list(range(1, count + 1))
    theirs = dict(state)
    for key, value in state.items():
        rows = _ROWS.get(key.rpartition(".")[0])
        if rows is None:
            continue
        taken = _taken(key, labels)
        left = [label for label in range(labels[-1] + 1) if label not in taken]
        by_label = value.new_zeros((labels[-1] + 1, rows, *value.shape[1:]))
        by_label[taken] = value.unflatten(0, (-1, rows))
        kept = None if spare is None else spare.get(key)
        if kept is not None and left and kept.shape == (len(left) * rows, *value.shape[1:]):
            by_label[left] = kept.unflatten(0, (-1, rows))
        elif key == "box_head.classes.bias":
            by_label[left] = _NEVER
        theirs[key] = by_label.flatten(0, 1)
    return theirs


def class_count(state: Mapping[str, Tensor]) -> int | None:
    """K of a state dict with our names and rows; None: it has no box head."""
    bias = state.get("box_head.classes.bias", state.get("box_head.stages.0.classes.bias"))
    return None if bias is None else len(bias) - 1


def keypoint_count(state: Mapping[str, Tensor]) -> int | None:
    """J of a state dict with our names; None: it has no keypoint head."""
    weight = state.get("keypoint_head.deconv.weight")
    return None if weight is None else weight.shape[1]


def _taken(key: str, labels: list[int]) -> list[int]:
    """torchvision's label of each of our rows, the background last where we have one."""
    return [*labels, 0] if key.startswith("box_head.classes") else labels
