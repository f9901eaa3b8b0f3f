"""What can be seen of a whole set of annotations: each check says what it found to `Problems`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.annotation import AS_NUMBER, measured_area, usable_area
from fastmrcnn.data.extents import FRACTIONS, SLACK, agree, apart, clip_boxes, likely_reason
from fastmrcnn.data.masks import mask_area
from fastmrcnn.data.records import ImageRecord, Problems

Flags = NDArray[np.bool_]

FEW = 4  # objects, and more: fewer say little of a set
REACH = 0.5  # of the longer side of a box by which a keypoint may lie beside it
TAKE_MASKS = "correct them, or take boxes from the masks (data.boxes=masks)"


class Table(NamedTuple):
    """The n annotations that are valid one by one."""

    labels: list[Any]
    """Their ids in the file, for messages."""
    records: list[ImageRecord]
    shapes: list[Any]
    """Arrays of polygons, or RLE; None without a mask."""
    boxes: NDArray[np.float64]
    """(n, 4) xyxy as in the file; NaN where there is none."""
    extents: NDArray[np.float64]
    """(n, 4) xyxy of the masks, not clipped; NaN without a mask."""
    covered: NDArray[np.float64]
    """(n,) about how many pixels the masks cover."""
    sizes: NDArray[np.float64]
    """(n, 2) width and height of the images."""
    crowd: Flags

    def some(self, chosen: Flags) -> list[Any]:
        """Labels of the chosen ones."""
        return [self.labels[index] for index in np.flatnonzero(chosen)]


def covers_no_pixel(table: Table, considered: Flags, problems: Problems) -> Flags:
    """Objects whose mask covers no pixel of the image: left out, and refused if they are at least half.

    Only what may well come out empty is rasterised: doing so for all of COCO would take a minute.
    """
    inside = clip_boxes(table.extents, table.sizes)
    sides = inside[:, 2:] - inside[:, :2]
    whole = np.prod(table.extents[:, 2:] - table.extents[:, :2], 1)
    masks = considered & ~np.isnan(table.covered) & ~table.crowd
    suspicious = (sides.min(1) < 2) | (table.covered < 4) | (2 * np.prod(sides, 1) < whole)
    empty = np.zeros(len(masks), bool)
    for index in np.flatnonzero(masks & suspicious):
        record = table.records[index]
        empty[index] = not mask_area(table.shapes[index], record.height, record.width)
    if empty.any():
        reason, _ = likely_reason(table.boxes[empty], table.extents[empty], table.sizes[empty])
        outside = (sides[empty] < 0).any(1) | (sides[empty].min(1) <= 0)
        if not reason and 2 * outside.sum() >= len(outside):
            reason = "they lie outside of the image, as masks of another image or size do"
        remedy = (
            f"{reason + '; ' if reason else ''}correct {'its' if empty.sum() == 1 else 'their'} segmentation"
        )
        message = "whose mask covers no pixel"
        if 2 * empty.sum() >= masks.sum():
            refuse(problems, f"{empty.sum()} of {masks.sum()} objects have a mask that covers no pixel",
                   table.some(empty), remedy)  # fmt: skip
        problems.say("left out", "object", message, remedy, table.some(empty))
    return empty


def unusable_boxes(table: Table, by_reason: dict[str, Flags], problems: Problems) -> None:
    """Boxes that are left out, with what they may be instead."""
    for reason, which in by_reason.items():
        if not which.any():
            continue
        known = which & ~np.isnan(table.extents[:, 0])
        likely = ""
        if known.any():
            likely, _ = likely_reason(table.boxes[known], table.extents[known], table.sizes[known])
        elif which.sum() >= 3 and (abs(table.boxes[which]) <= 1).all():
            likely = FRACTIONS
        remedy = f"{likely + '; ' if likely else ''}correct or remove {'it' if which.sum() == 1 else 'them'}"
        problems.say("left out", "box", reason, remedy, table.some(which))


def boxes_beside_masks(table: Table, considered: Flags, problems: Problems) -> None:
    """Boxes that are not those of their masks: told, and refused if they are more than half."""
    known = considered & ~np.isnan(table.boxes[:, 0]) & ~np.isnan(table.extents[:, 0]) & ~table.crowd
    boxes, extents, sizes = table.boxes[known], table.extents[known], table.sizes[known]
    seen, meant = clip_boxes(boxes, sizes), clip_boxes(extents, sizes)
    off = ~agree(seen, meant)
    if not off.any():
        return
    reason, share = likely_reason(boxes[off], extents[off], sizes[off])
    far = apart(seen, meant)
    which = np.zeros(len(known), bool)
    which[np.flatnonzero(known)[off]] = True
    way_out = "correct them" if reason.startswith("masks look") else TAKE_MASKS
    remedy = f"{reason + '; ' if reason else ''}{way_out}"
    most = 2 * far.sum() > len(off) or (share >= 0.8 and 2 * off.sum() > len(off))
    if most and off.sum() >= FEW:
        refuse(problems, f"{off.sum()} of {len(off)} objects have a bbox that is not the box of their mask",
               table.some(which), remedy)  # fmt: skip
    problems.say("note", "object", "whose bbox is not the box of its mask", remedy, table.some(which))


def keypoints_beside_objects(
    table: Table,
    points: Sequence[NDArray[np.float32] | None],
    offset: float,
    inside: NDArray[np.float64],
    problems: Problems,
) -> None:
    """Labelled keypoints that are not near their object: told, and refused if they are in another unit.

    Args:
        points: (J, 3) x, y, visibility in continuous pixels; None where none is labelled.
        offset: what was added to the x and y of the file.
        inside: (n, 4) boxes, clipped to the image.
    """
    which = np.array([index for index, found in enumerate(points) if found is not None], np.int64)
    if not len(which):
        return
    given = np.stack([found for found in points if found is not None]).astype(np.float64)
    place, labelled = given[:, :, :2] - offset, given[:, :, 2] > 0
    boxes, sizes = inside[which, None], table.sizes[which, None]
    low, high = boxes[..., :2], boxes[..., 2:]
    slack = np.maximum(SLACK, REACH * (high - low).max(-1, keepdims=True))

    def strays(at: NDArray[np.float64]) -> Flags:
        """Which of the objects have a labelled keypoint beyond their reach."""
        beyond = np.any((at < low - slack) | (at > high + slack), 2)
        return np.any(beyond & labelled, 1)

    off = strays(place)
    if not off.any():
        return
    ways = [
        ("keypoints look like fractions of the image, and COCO's are in pixels", place * sizes),
        ("keypoints look like percent of the image, and COCO's are in pixels", place * sizes / 100),
        ("keypoints look as if counted from the corner of their box, and COCO's are from that of the image",
         low + place),
        ("x and y are exchanged in keypoints", place[..., ::-1]),
        ("y of keypoints is counted from the bottom of the image", np.abs([[[0, 1]]] * sizes - place)),
        ("keypoints at 0, 0 are labelled: a flag of 0 says that one is not there",
         np.where((place == 0).all(-1, keepdims=True), low, place)),
    ]  # fmt: skip
    shares = [float((~strays(at))[off].mean()) for _, at in ways]
    best = int(np.argmax(shares))  # the first of equals: a fraction lies in any box that it is added to
    remedy = f"{ways[best][0] + '; ' if shares[best] >= 0.5 else ''}correct them"
    chosen = np.zeros(len(points), bool)
    chosen[which[off]] = True
    other_unit = best < 2
    if other_unit and shares[best] >= 0.8 and off.sum() >= FEW and 2 * off.sum() > len(which):
        message = f"{off.sum()} of {len(which)} objects have keypoints far from their box"
        refuse(problems, message, table.some(chosen), remedy)
    problems.say("note", "object", "with a labelled keypoint far from its box", remedy, table.some(chosen))


def repeated_objects(table: Table, classes: Sequence[int], considered: Flags, problems: Problems) -> None:
    """The same object annotated twice: told, since one of the two is never found.

    Args:
        classes: n class indices.
    """
    images = np.array([record.image_id for record in table.records], np.float64)
    boxes = np.where(np.isnan(table.boxes), table.extents, table.boxes)
    keys = np.column_stack((images, boxes))
    order = np.lexsort(keys.T)
    order = order[considered[order]]
    pairs = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(1))  # few have the box of another
    seen: set[bytes] = set()
    again = np.zeros(len(keys), bool)
    for index in np.unique(order[np.concatenate((pairs, pairs + 1))]):
        mask = (*table.extents[index], table.covered[index])
        whole = np.array([*keys[index], *mask, classes[index]]).tobytes()
        again[index] = whole in seen
        seen.add(whole)
    if again.any():
        problems.say(
            "note",
            "object",
            "whose image, class, box and mask are those of another",
            "remove them; evaluation counts what is found once as missed once",
            table.some(again),
        )


def sensible_areas(
    table: Table, areas: list[Any], inside: NDArray[np.float64], problems: Problems
) -> NDArray[np.float64]:
    """The areas of all objects: as given, or measured where that cannot be.

    Evaluation sorts objects by area, and divides by it the distances of keypoints.

    Args:
        areas: as they stand in the file, None where there is none.
        inside: (n, 4) boxes, clipped to the image.
    """
    given = np.array([usable_area(area) for area in areas])  # NaN where there is none above 0
    text = np.array([isinstance(area, str) for area in areas]) & ~np.isnan(given)
    if text.any():
        problems.say("note", "object", "with area given as text", AS_NUMBER, table.some(text))
    boxes = np.where(np.isnan(table.boxes), inside, table.boxes)
    room = np.prod(boxes[:, 2:] - boxes[:, :2], 1)
    doubtful = np.isnan(given) | (20 * given < room) | (given > 1.25 * room + 16)
    doubtful |= (4 * given < table.covered) | (given > 4 * table.covered + 16)
    found = given.copy()
    for index in np.flatnonzero(doubtful):
        record, box = table.records[index], tuple(inside[index].tolist())
        measured = measured_area(table.shapes[index], box, record)
        if not measured / 2 <= given[index] <= 2 * measured:
            found[index] = measured
            if areas[index] is not None:
                what = (
                    "whose area is not that of its mask"
                    if table.shapes[index]
                    else "whose area is not that of its box"
                )
                problems.say("note", "object", what, "measured anew", [table.labels[index]])
    return found


def crowd_regions(table: Table, problems: Problems) -> None:
    """Most objects are crowd regions, which are neither learnt nor judged: told."""
    if table.crowd.any() and 2 * table.crowd.sum() > len(table.crowd):
        problems.say(
            "note",
            "",
            f"{table.crowd.sum()} of {len(table.crowd)} objects have iscrowd=1: they are regions that are "
            "neither learnt nor judged",
            "some programs write it with every RLE: set it to 0 for objects",
        )


def classes_without_objects(names: Sequence[str], indices: Sequence[int], problems: Problems) -> None:
    """Classes that no object has, and names that two categories have."""
    unused = sorted(set(range(len(names))) - set(indices))
    if unused and len(unused) < len(names):
        remedy = (
            "it is not learnt, and has no AP" if len(unused) == 1 else "they are not learnt, and have no AP"
        )
        problems.say("note", "class", "without any object", remedy, [names[index] for index in unused])
    for name, times in Counter(names).items():
        if times > 1:
            problems.say(
                "note", "", f"{times} categories have the name '{name}'",
                "they are classes of their own; their results bear the id too",
            )  # fmt: skip


def refuse(problems: Problems, message: str, ids: Sequence[Any], remedy: str) -> None:
    """An error of the whole set, with the first three of the annotations that it is about."""
    some = ", ".join(str(i) for i in ids[:3]) + (", ..." if len(ids) > 3 else "")
    problems.say("error", "", f"{message} (annotation {some})", remedy)
