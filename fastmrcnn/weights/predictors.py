"""The last predictors of one model in another: the rows of a class, or of a keypoint, go by its name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from fastmrcnn.data.keypoints import schema_of_weights
from fastmrcnn.data.same_classes import match_classes
from fastmrcnn.model.mask_rcnn import MaskRCNN
from fastmrcnn.weights.card import ModelCard
from fastmrcnn.weights.peers.class_rows import class_count, keypoint_count
from fastmrcnn.weights.peers.classes import ClassTable, known_classes, numbered_classes
from fastmrcnn.weights.peers.programs import grouped

_BOX_HEADS = ("box_head", "box_head.stages.0", "box_head.stages.1", "box_head.stages.2")
_OF_CLASSES = (
    *(f"{head}.{leaf}" for head in _BOX_HEADS for leaf in ("classes", "deltas")),
    "mask_head.predictor",
)
_OF_KEYPOINTS = ("keypoint_head.deconv",)
_MOST_NAMES = 20  # that a line lists


class Predictors(NamedTuple):
    """What becomes of a model's last predictors."""

    given: dict[str, Tensor]  # with rows of the file
    partly: set[str]  # those of them that have rows of their own, too
    left: list[str]  # as they are in the model
    lines: list[str]  # that say so


class _Pairs(NamedTuple):
    """What here is what in the file."""

    found: list[tuple[int, int]]  # indices here and there
    line: str | None  # that says what was paired
    why_not: str  # a reason for the case that nothing was


def take_predictors(
    state: Mapping[str, Tensor], model: MaskRCNN, card: ModelCard | None, theirs: ModelCard | None
) -> Predictors:
    """A model's last predictors with the rows of another one's.

    The rows of a class go to the class of the same name, those of the background to the background, and
    what serves all classes alike is taken as it is. Where either side does not name its classes, they are
    taken in their order if there are as many, else not. It is the same with keypoints.

    Args:
        state: the other model's weights, under our names.
        card: what `model` is to find; None: it is not known.
        theirs: what the other model finds; None: its file does not tell, but COCO's classes and
            keypoints are known by their number.
    """
    own = model.state_dict()
    result = Predictors({}, set(), [], [])
    here, there = class_count(own), class_count(state)
    if here is not None and there is not None:
        classes = _theirs_named(theirs, there, keypoints=keypoint_count(state) is not None)
        names = None if card is None else ClassTable(card.class_names, card.category_ids)
        pairs = _paired("classes", here, there, names, classes)
        _take_classes(state, model, own, here, there, pairs, result)
    here, there = keypoint_count(own), keypoint_count(state)
    if here is not None and there is not None:
        _take_keypoints(state, own, _paired_keypoints(here, there, card, theirs), result)
    return result


def _take_classes(
    state: Mapping[str, Tensor],
    model: MaskRCNN,
    own: Mapping[str, Tensor],
    here: int,
    there: int,
    pairs: _Pairs,
    result: Predictors,
) -> None:
    left, unlike = [], []
    for key in _common(state, own, _OF_CLASSES):
        rows, shared = _layout(model, key, own[key])
        if len(state[key]) % rows:
            continue  # the shapes differ by more than classes, which is told with the other tensors
        ours, given = (value.unflatten(0, (-1, rows)) for value in (own[key], state[key]))
        given_shared = len(given) == 1 and there != 1
        extra = len(ours) - here  # the background
        if shared or given_shared:
            if len(ours) == len(given):
                result.given[key] = state[key]
            else:
                unlike.append(key)
        elif extra != len(given) - there:
            unlike.append(key)
        elif pairs.found:
            background = [(here, there)] if extra else []
            result.given[key] = _with_rows(ours, given, [*pairs.found, *background]).flatten(0, 1)
            if len(pairs.found) < here:
                result.partly.add(key)
        else:
            left.append(key)
    _tell(pairs, left, result)
    if unlike:
        result.left.extend(unlike)
        result.lines.append(
            "Left out, since only one of the two models has them for each class by itself "
            f"(class_agnostic, softmax): {grouped(unlike)}"
        )


def _take_keypoints(
    state: Mapping[str, Tensor], own: Mapping[str, Tensor], pairs: _Pairs, result: Predictors
) -> None:
    left = []
    for key in _common(state, own, _OF_KEYPOINTS):
        if not pairs.found:
            left.append(key)
            continue
        axis = 1 if own[key].dim() > 1 else 0  # of a transposed convolution's weight
        ours, given = (value.movedim(axis, 0) for value in (own[key], state[key]))
        result.given[key] = _with_rows(ours, given, pairs.found).movedim(0, axis).contiguous()
        if len(pairs.found) < len(ours):
            result.partly.add(key)
    _tell(pairs, left, result)


def _common(state: Mapping[str, Tensor], own: Mapping[str, Tensor], owners: Sequence[str]) -> list[str]:
    """The predictors that both have, and that differ in shape by classes or keypoints at most."""

    def rest(key: str, value: Tensor) -> tuple[int, ...]:
        axis = 1 if key.startswith(_OF_KEYPOINTS) and value.dim() > 1 else 0
        return (*value.shape[:axis], *value.shape[axis + 1 :])

    both = (key for key in state if key in own and key.rpartition(".")[0] in owners)
    return [
        key
        for key in both
        if own[key].dim() == state[key].dim() and rest(key, own[key]) == rest(key, state[key])
    ]


def _layout(model: MaskRCNN, key: str, own: Tensor) -> tuple[int, bool]:
    """How many rows a class has, and whether all classes share them."""
    if key.startswith("mask_head."):
        assert model.mask_head is not None
        return len(own) // model.mask_head.mask_channels, model.mask_head.class_agnostic
    assert model.box_head is not None
    return (4, model.box_head.class_agnostic) if ".deltas." in key else (1, False)


def _with_rows(ours: Tensor, given: Tensor, pairs: Sequence[tuple[int, int]]) -> Tensor:
    result = ours.clone()
    here, there = (list(indices) for indices in zip(*pairs, strict=True))
    result[here] = given[there].to(result)
    return result


def _theirs_named(theirs: ModelCard | None, count: int, keypoints: bool) -> ClassTable | None:
    if theirs is None:
        return known_classes(count, keypoints)
    table = ClassTable(theirs.class_names, theirs.category_ids)
    # A converted file that did not tell its classes has numbers in place of names.
    return None if table == numbered_classes(count) else table


def _paired_keypoints(here: int, there: int, card: ModelCard | None, theirs: ModelCard | None) -> _Pairs:
    def named(names: list[str], count: int) -> ClassTable | None:
        numbers = [str(number) for number in range(1, count + 1)]
        return None if names == numbers else ClassTable(names, list(range(1, count + 1)))

    ours = None if card is None or card.keypoints is None else named(card.keypoints.names, here)
    schema = None if theirs is None else theirs.keypoints
    return _paired("keypoints", here, there, ours, named((schema or schema_of_weights(there)).names, there))


def _paired(things: str, here: int, there: int, ours: ClassTable | None, theirs: ClassTable | None) -> _Pairs:
    counts = f"the file has {there} {things} and this model {here}"
    if ours is None or theirs is None:
        if here != there:
            return _Pairs([], None, counts)
        same = [(index, index) for index in range(here)]
        if ours is None:
            return _Pairs(same, None, "")
        line = f"The file does not name its {things}; they are taken in its order for {_listed(ours.names)}"
        return _Pairs(same, line, "")
    found = match_classes(*ours, *theirs)
    pairs = [(index, match) for index, match in enumerate(found) if match is not None]
    new = [name for name, match in zip(ours.names, found, strict=True) if match is None]
    used = {match for _, match in pairs}
    spare = [name for index, name in enumerate(theirs.names) if index not in used]
    line = (
        f"Taken over by name, {len(pairs)} of {here} {things}: {_listed([ours.names[i] for i, _ in pairs])}"
    )
    if new:
        line += f"; new, from random weights: {_listed(new)}"
    if spare:
        line += f"; in the file alone: {_listed(spare)}"
    return _Pairs(pairs, line, f"{counts}, none of the same name ({_listed(theirs.names)} there)")


def _tell(pairs: _Pairs, left: list[str], result: Predictors) -> None:
    result.left.extend(left)
    if left:
        result.lines.append(f"Left out, since {pairs.why_not}: {grouped(left)}")
    elif pairs.line is not None and pairs.found:
        result.lines.append(pairs.line)


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MOST_NAMES} more" if len(names) > _MOST_NAMES else ""
    return ", ".join(names[:_MOST_NAMES]) + more
