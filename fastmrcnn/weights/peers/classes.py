"""COCO's classes, as they stand in instances_val2017.json: 80 names, with ids between 1 and 90."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from fastmrcnn.errors import UserError
from fastmrcnn.files import expanded


class ClassTable(NamedTuple):
    names: list[str]  # of classes 0..K-1
    ids: list[int]  # of the data set's categories, by class


# Of the 90 ids, ten were planned but never annotated.
_UNUSED = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
_NAMES = """
person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant, stop sign,
parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe, backpack, umbrella,
handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard,
surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, orange,
broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, dining table, toilet, tv,
laptop, mouse, remote, keyboard, cell phone, microwave, oven, toaster, sink, refrigerator, book, clock, vase,
scissors, teddy bear, hair drier, toothbrush
"""
COCO = ClassTable(
    [name.strip() for name in _NAMES.split(",")],
    [number for number in range(1, 91) if number not in _UNUSED],
)
COCO_LABELS = 90  # torchvision's COCO models have an output for each id, the unused ones included
PERSON = ClassTable(["person"], [1])  # of COCO's keypoint files


def coco_with_unused() -> ClassTable:
    """All 90 ids, those without a class named after their number."""
    named = dict(zip(COCO.ids, COCO.names, strict=True))
    ids = list(range(1, COCO_LABELS + 1))
    return ClassTable([named.get(number, f"unused {number}") for number in ids], ids)


def known_classes(count: int, keypoints: bool = False) -> ClassTable | None:
    """The classes of a published model with `count` of them; None: its file does not tell them."""
    if count == len(COCO.names):
        return COCO
    return PERSON if count == 1 and keypoints else None


def numbered_classes(count: int) -> ClassTable:
    """For want of names."""
    return ClassTable([f"class {number}" for number in range(1, count + 1)], list(range(1, count + 1)))


def read_classes(path: str | Path) -> ClassTable:
    """Classes from a COCO annotation file (its categories, by id) or from a text file, one name a line.

    A text file gives ids 1, 2, ...

    Raises:
        UserError: it cannot be read, or names a class twice or none.
    """
    path = expanded(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file of classes") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    if text.lstrip().startswith("{"):
        table = _from_annotations(text, path)
    else:
        names = [line.strip() for line in text.splitlines() if line.strip()]
        table = ClassTable(names, list(range(1, len(names) + 1)))
    if not table.names:
        raise UserError(f"{path}: names no class; write one name a line")
    twice = sorted({name for name in table.names if table.names.count(name) > 1})
    if twice:
        raise UserError(
            f"{path}: names {', '.join(twice)} more than once; each class needs a name of its own"
        )
    return table


def _from_annotations(text: str, path: Path) -> ClassTable:
    try:
        categories = json.loads(text)["categories"]
        by_id = {int(entry["id"]): str(entry["name"]) for entry in categories}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{path}: is neither a COCO annotation file with categories nor a list of names, one a line"
        ) from None
    return ClassTable([by_id[number] for number in sorted(by_id)], sorted(by_id))
