"""Keypoints as COCO writes them: names, lines that join them, pairs that swap in a mirror, places."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.flat_records import FlatRecords
from fastmrcnn.data.masks import FARTHEST
from fastmrcnn.data.records import Problems
from fastmrcnn.data.values import all_finite
from fastmrcnn.errors import UserError

OPPOSITE = {"left": "right", "right": "left", "l": "r", "r": "l"}
COCO_KEYPOINTS = 17  # of a person; pycocotools has their sigmas
UNIFORM_SIGMA = 0.05  # of other keypoints, unless given


class KeypointSchema(NamedTuple):
    """What the J keypoints of an object are."""

    names: list[str]
    skeleton: list[tuple[int, int]]
    """Keypoints that are joined by a line, counted from 0."""
    mirror: list[int]
    """Which keypoint each one becomes in a mirror image; itself if it is neither left nor right."""


class KeypointOptions(NamedTuple):
    """How to read keypoints, in the words of the configuration's `data` section."""

    flip_pairs: Sequence[tuple[str, str]] | None = None
    """Names that swap in a mirror image; None: those that differ in the word left or right."""
    offset: float = 0.5
    """Added to the file's x and y. COCO numbers pixels, and pixel i covers [i, i + 1)."""
    least: int = 0
    """Images whose objects have fewer labelled keypoints are left out."""


def read_schema(
    categories: Sequence[Any], flip_pairs: Sequence[tuple[str, str]] | None, file: Path, problems: Problems
) -> KeypointSchema:
    """What the categories of a file say of keypoints. Those that name some must name the same.

    Raises:
        UserError: no category names keypoints.
    """
    found: KeypointSchema | None = None
    first = None
    for entry in categories:
        if not isinstance(entry, dict) or not entry.get("keypoints"):
            continue
        category, names, skeleton = entry.get("id"), entry["keypoints"], entry.get("skeleton") or []
        fault = _names_fault(names) or _skeleton_fault(skeleton, len(names))
        if fault is None and found is not None and names != found.names:
            fault = f"its keypoints are not those of category {first}; all categories must name the same ones"
        if fault is not None:
            problems.add("category", category, fault)
        elif found is None:
            first = category
            try:
                mirror = mirror_of(names, flip_pairs)
            except ValueError as error:
                problems.add("category", category, str(error))
                mirror = list(range(len(names)))
            found = KeypointSchema(list(names), [(a - 1, b - 1) for a, b in skeleton], mirror)
    problems.check(file)
    if found is None:
        raise UserError(
            f"{file}: no category names its keypoints; give one a list of names, "
            '"keypoints": ["nose", ...], or train without (model.keypoint_head.enabled=false)'
        )
    return found


def schema_of_weights(count: int) -> KeypointSchema:
    """Of a model that does not name its J keypoints: COCO's person for 17, else plain numbers."""
    if count == len(COCO_PERSON.names):
        return COCO_PERSON
    return KeypointSchema([str(index) for index in range(1, count + 1)], [], list(range(count)))


def mirror_of(names: Sequence[str], pairs: Sequence[tuple[str, str]] | None = None) -> list[int]:
    """Which keypoint each one becomes in a mirror image.

    Args:
        names: of the J keypoints.
        pairs: names that swap; None: names that differ in the word left or right (or l and r) swap, as
            in left_eye and right_eye, EyeLeft and EyeRight, "L ear" and "R ear".
    Raises:
        ValueError: a name is unknown, in two pairs, or left without a right.
    """
    mirror = list(range(len(names)))
    place = {name: index for index, name in enumerate(names)}
    if pairs is not None:
        seen: set[str] = set()
        for pair in pairs:
            for name in pair:
                if name not in place:
                    raise ValueError(
                        f"has no keypoint '{name}', which data.keypoint_flip_pairs names; it has "
                        f"{_list(names)}"
                    )
                if name in seen:
                    raise ValueError(f"keypoint '{name}' is twice in data.keypoint_flip_pairs")
                seen.add(name)
            a, b = (place[name] for name in pair)
            mirror[a], mirror[b] = b, a
        return mirror
    by_words = {_words(name): index for index, name in enumerate(names)}
    for index, name in enumerate(names):
        words = _words(name)
        other = by_words.get(tuple(OPPOSITE.get(word, word) for word in words))
        if other is not None:
            mirror[index] = other
        elif {"left", "right"} & set(words):
            raise ValueError(
                f"keypoint '{name}' has no counterpart on the other side; name the pairs that swap in a "
                "mirror image in data.keypoint_flip_pairs, or set it to [] if none do"
            )
    return mirror


def keypoint_fault(entry: dict[str, Any], schema: KeypointSchema) -> str | None:
    """What is wrong with the keypoints of an annotation, or None. An object may have none."""
    values, count = entry.get("keypoints"), len(schema.names)
    if not values:
        number = entry.get("num_keypoints")
        return f"num_keypoints is {number!r}, but there are no keypoints" if number else None
    if not isinstance(values, list) or len(values) != 3 * count:
        what = f"{len(values)} numbers" if isinstance(values, list) else f"a {type(values).__name__}"
        return f"keypoints is {what}, expected {3 * count}: x, y and visibility of {count} keypoints"
    if not all_finite(values):
        return "keypoints has values that are not finite numbers"
    if max(values) > FARTHEST or min(values) < -FARTHEST:
        return f"keypoints has a coordinate of more than {FARTHEST:,} pixels"
    for name, visibility in zip(schema.names, values[2::3], strict=True):
        if visibility not in (0, 1, 2):
            return (
                f"visibility of keypoint '{name}' is {visibility!r}; it must be 0 (not labelled), 1 (hidden) "
                "or 2 (visible)"
            )
    return None


def pack_keypoints(entry: dict[str, Any], offset: float) -> NDArray[np.float32] | None:
    """(J, 3) x, y, visibility in continuous annotation pixels; None if no keypoint is labelled."""
    if not entry.get("keypoints"):
        return None
    values = np.array(entry["keypoints"], np.float64).reshape(-1, 3)
    labelled = values[:, 2] > 0
    if not labelled.any():
        return None
    values[:, :2] += offset
    values[~labelled] = 0
    return values.astype(np.float32)


def keep_labelled(records: FlatRecords, options: KeypointOptions | None) -> FlatRecords:
    """The images with as many labelled keypoints as the options ask for."""
    if options is None or options.least <= 0:
        return records
    return records.chosen(records.labelled_keypoints >= options.least)


def check_same_keypoints(
    own: KeypointSchema | None, known: KeypointSchema | None, file: Path, source: str
) -> None:
    """UserError if a file's keypoints are not those of `source`, a training set or a checkpoint."""
    if own is not None and known is not None and own.names != known.names:
        raise UserError(
            f"{file}: its keypoints do not match {source}: {_list(own.names)} here, {_list(known.names)} "
            "there; give both files the same names in the same order"
        )


def _names_fault(names: Any) -> str | None:
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        return "keypoints is not a list of names"
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"keypoint '{twice[0]}' is there twice" if twice else None


def _skeleton_fault(skeleton: Any, count: int) -> str | None:
    def is_edge(edge: Any) -> bool:
        return (
            isinstance(edge, list | tuple)
            and len(edge) == 2
            and all(type(end) is int and 1 <= end <= count for end in edge)
        )

    if isinstance(skeleton, list) and all(is_edge(edge) for edge in skeleton):
        return None
    return f"skeleton is not a list of pairs of keypoints, numbered from 1 to {count}"


def _words(name: str) -> tuple[str, ...]:
    """Left-eye, left_eye, leftEye and "Left eye" are all ("left", "eye")."""
    parted = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", name)
    return tuple(re.findall(r"[^\W\d_]+|\d+", parted.lower()))


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


_SIDES = ("eye", "ear", "shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_PERSON = ["nose", *(f"{side}_{part}" for part in _SIDES for side in ("left", "right"))]
# Of the category "person" in COCO's person_keypoints files, its lines numbered from 1 as there.
_LINES = (
    (16, 14), (14, 12), (17, 15), (15, 13), (12, 13), (6, 12), (7, 13), (6, 7), (6, 8), (7, 9),
    (8, 10), (9, 11), (2, 3), (1, 2), (1, 3), (2, 4), (3, 5), (4, 6), (5, 7),
)  # fmt: skip
COCO_PERSON = KeypointSchema(_PERSON, [(a - 1, b - 1) for a, b in _LINES], mirror_of(_PERSON))


def choose_sigmas(
    count: int, given: Sequence[float] | None, of_a_person: Sequence[float] = (1.0,) * COCO_KEYPOINTS
) -> NDArray[np.float64]:
    """Sigmas of the object keypoint similarity, in units of the square root of the object's area.

    Args:
        count: J.
        given: one for each keypoint, from the configuration's evaluate.oks_sigmas; None: COCO's own for
            17 keypoints, else 0.05 for each.
    Raises:
        UserError: there are not J of them.
    """
    if given is None:
        return np.array(of_a_person) if count == COCO_KEYPOINTS else np.full(count, UNIFORM_SIGMA)
    if len(given) != count:
        raise UserError(
            f"evaluate.oks_sigmas has {len(given)} values, but there are {count} keypoints; give one for each"
        )
    return np.array(given, np.float64)
