"""One annotation of a COCO file: its values in COCO's types, and what is wrong with it."""

from __future__ import annotations

import math
from typing import Any

from fastmrcnn.data.masks import FARTHEST, mask_area, segmentation_problem
from fastmrcnn.data.records import Box, ImageRecord, Problems
from fastmrcnn.data.values import LARGEST, all_finite, number, numbers, whole

AS_NUMBER = "taken for the number it stands for"
CROWD = {"0": 0, "1": 1, "false": 0, "true": 1, "none": 0}  # other programs' words for iscrowd


def number_anew(entries: list[Any], problems: Problems) -> list[Any]:
    """What each annotation is called in messages: its id in the file.

    Only the order of ids matters, and that they differ: where they do not, are no whole numbers, or are not
    above 0 (pycocotools takes 0 for "no match"), the entries get new ones by their place in the file. The
    same entry twice is a mistake.
    """
    ids = [entry.get("id") if isinstance(entry, dict) else None for entry in entries]
    if all(type(i) is int and 0 < i <= LARGEST for i in ids) and len(set(ids)) == len(ids):
        return ids
    labels: list[Any] = []
    seen: dict[Any, Any] = {}
    odd: dict[str, list[Any]] = {}
    for position, (entry, given) in enumerate(zip(entries, ids, strict=True), start=1):
        known = isinstance(given, int | float | str) and given != "" and not isinstance(given, bool)
        labels.append(given if known else f"number {position}")
        if not isinstance(entry, dict):
            continue
        why = None
        if not known:
            why = "without an id"
        elif isinstance(given, int | float) and given > LARGEST:  # the parser may make these floats
            why = "with an id that is too large"
        elif type(given) is not int:
            why = "with an id that is not a whole number"
        elif given <= 0:
            why = "with an id that is not above 0"
        if known and given in seen:
            if seen[given] == entry:
                problems.add("annotation", given, "its id is there twice", remedy="remove one of the two")
            why = why or "with an id that another has"
        elif known:
            seen[given] = dict(entry)
        if why:
            odd.setdefault(why, []).append(labels[-1])
        entry["id"] = position
    for why, which in odd.items():
        problems.say("note", "object", why, "numbered anew inside, by their place in the file", which)
    return labels


def tidy(entry: dict[str, Any], label: Any, problems: Problems) -> None:
    """Write ids and iscrowd as whole numbers, where they are text, floats, or true and false."""
    for key in ("image_id", "category_id"):
        given = entry.get(key)
        if type(given) is not int and (found := whole(given)) is not None:
            entry[key] = found
            if isinstance(given, str):
                problems.say("note", "object", f"with {key} given as text", AS_NUMBER, [label])
    if entry.get("ignore"):
        remedy = "it is an object like others: COCO's judge only looks at iscrowd; set that to 1 to ignore it"
        problems.say("note", "object", "with ignore set", remedy, [label])
    crowd = entry.get("iscrowd", 0)
    if type(crowd) is not int:
        meant = CROWD.get(str(crowd).strip().lower()) if isinstance(crowd, str | bool | None) else crowd
        if meant in (0, 1):
            entry["iscrowd"] = int(meant)
            if not isinstance(crowd, float):
                kind = {bool: "true or false", str: "text"}.get(type(crowd), "null")
                problems.say("note", "object", f"with iscrowd given as {kind}", "taken for 0 or 1", [label])


def spell_out(entry: dict[str, Any], label: Any, problems: Problems) -> None:
    """Write coordinates that are text as numbers, of an entry that is faulty as it is."""

    def spelt(values: Any, key: str) -> Any:
        if not isinstance(values, list) or str not in map(type, values) or (found := numbers(values)) is None:
            return values
        problems.say("note", "object", f"with {key} given as text", AS_NUMBER, [label])
        return found

    for key in ("bbox", "keypoints"):
        if key in entry:
            entry[key] = spelt(entry[key], key)
    if isinstance(entry.get("num_keypoints"), str) and (count := number(entry["num_keypoints"])) is not None:
        entry["num_keypoints"] = count
    shape = entry.get("segmentation")
    if isinstance(shape, list):
        entry["segmentation"] = [spelt(polygon, "segmentation") for polygon in shape]
    elif isinstance(shape, dict) and isinstance(shape.get("size"), list):
        sides = [whole(side) for side in shape["size"]]
        if None not in sides:
            shape["size"] = sides


def count_keypoints(entry: dict[str, Any], label: Any, problems: Problems) -> None:
    """Set num_keypoints to the number of labelled ones, since COCO's judge leaves out objects with none."""
    points = entry.get("keypoints") or []
    labelled = sum(flag > 0 for flag in points[2::3])
    given = entry.get("num_keypoints", labelled)
    if type(given) is not int or given != labelled:
        message = "whose num_keypoints is not the number of its keypoints with a flag above 0"
        problems.say("note", "object", message, "counted by the flags", [label])
    entry["num_keypoints"] = labelled


def is_empty(entry: dict[str, Any]) -> bool:
    """Whether an entry has neither box nor mask, as some programs write for an image without objects."""
    bbox = entry.get("bbox")
    return not entry.get("segmentation") and (not bbox or bbox == [0, 0, 0, 0])


def annotation_fault(
    entry: dict[str, Any], records: dict[Any, ImageRecord], index_of: dict[Any, int], needs_box: bool
) -> str | None:
    """Why an annotation cannot be used, or None."""
    image_id, category_id = entry.get("image_id"), entry.get("category_id")
    if type(image_id) is not int or image_id not in records:
        return f"image_id {image_id!r} is not among the images"
    if is_empty(entry):
        return None
    if type(category_id) is not int or category_id not in index_of:
        return f"category_id {category_id!r} is not among the categories"
    bbox, crowd, shape = entry.get("bbox"), entry.get("iscrowd", 0), entry.get("segmentation")
    if (needs_box or not shape) and (fault := box_fault(bbox)) is not None:
        return fault
    if crowd not in (0, 1):
        return f"iscrowd is {crowd!r}, not 0 or 1"
    if shape:
        record = records[image_id]
        return segmentation_problem(shape, record.height, record.width)
    return None


def box_fault(bbox: Any) -> str | None:
    if not isinstance(bbox, list) or len(bbox) != 4 or not all_finite(bbox) or bool in map(type, bbox):
        return (
            f"bbox {bbox!r} is not four finite numbers [x, y, width, height]; correct it, or take boxes from "
            "the masks (data.boxes=masks)"
        )
    if max(bbox) > FARTHEST or min(bbox) < -FARTHEST:
        return f"bbox {bbox!r} has a number of more than {FARTHEST:,} pixels"
    return None


def corners(bbox: list[float]) -> Box:
    x, y, w, h = bbox
    return float(x), float(y), float(x + w), float(y + h)


def box_area(bbox: list[float]) -> float:
    return float(bbox[2] * bbox[3])


def usable_area(given: Any) -> float:
    """The area as the file has it, a text taken for its number; NaN if there is none above 0."""
    found = given if type(given) is float and 0 < given < math.inf else number(given)
    return float(found) if found is not None and found > 0 else float("nan")


def measured_area(shape: Any, inside: Box, record: ImageRecord) -> float:
    """Pixels of the mask; of the box, where there is no mask."""
    if shape is not None:
        return float(mask_area(shape, record.height, record.width))
    return (inside[2] - inside[0]) * (inside[3] - inside[1])
