"""What can be seen of a whole set of annotations: each check says what it found to `Problems`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.annotation import AS_NUMBER, measured_area, usable_area
from fastmrcnn.data.extents import FRACTIONS, agree, apart, clip_boxes, likely_reason
from fastmrcnn.data.masks import mask_area
from fastmrcnn.data.records import ImageRecord, Problems

Flags = NDArray[np.bool_]

FEW = 4  # objects, and more: fewer say little of a set
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


def repeated_objects(table: Table, classes: Sequence[int], problems: Problems) -> None:
    """Objects with the class, box and mask of another of their image: told. They count twice."""
    images = np.array([record.image_id for record in table.records], np.float64)
    boxes = np.where(np.isnan(table.boxes), table.extents, table.boxes)
    keys = np.column_stack((images, boxes))
    order = np.lexsort(keys.T)
    pairs = np.flatnonzero((keys[order[1:]] == keys[order[:-1]]).all(1))  # few have the box of another
    seen: set[bytes] = set()
    again = np.zeros(len(keys), bool)
    for index in np.unique(order[np.concatenate((pairs, pairs + 1))]):
        mask = (*table.extents[index], table.covered[index])
        whole = np.array([*keys[index], *mask, classes[index], table.crowd[index]]).tobytes()
        again[index] = whole in seen and not table.crowd[index]
        seen.add(whole)
    if again.any():
        message = "with the class, box and mask of another in its image"
        problems.say("note", "object", message, "learnt and judged twice; remove one", table.some(again))


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
