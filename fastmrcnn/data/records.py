"""What is known of the images and objects of a data set, and the mistakes found in them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastmrcnn.data.pixel_range import AS_IT_IS, Reading
from fastmrcnn.errors import UserError

Box = tuple[float, float, float, float]


@dataclass(frozen=True, slots=True)
class ObjectRecord:
    annotation_id: int
    class_index: int
    """0..K-1."""
    box: Box
    """xyxy in annotation pixels, clipped to the image."""
    crowd: bool
    segmentation: Any
    """List of polygons, arrays (x1, y1, x2, y2, ...), or RLE as in the file; None if there is none."""
    area: float
    keypoints: NDArray[np.float32] | None = None
    """(J, 3) x, y, visibility (0 not labelled, 1 hidden, 2 visible) in annotation pixels, pixel i covering
    [i, i + 1); None if none is labelled."""


@dataclass(frozen=True, slots=True)
class ImageRecord:
    image_id: int
    path: Path
    file_name: str
    width: int
    height: int
    objects: Sequence[ObjectRecord]
    annotations: Path
    """The file that lists this image, for messages."""
    reading: Reading = AS_IT_IS


class ImageProposals(NamedTuple):
    """Of one image, by falling score."""

    boxes: NDArray[np.float32]  # (n, 4) xyxy in pixels of the original image
    scores: NDArray[np.float32]  # (n,) objectness


Severity = Literal["error", "left out", "note"]
"""error: the set is refused. left out: not used, and counted. note: used, but its user should know."""

PLURALS = {"category": "categories", "class": "classes", "box": "boxes"}


@dataclass(slots=True)
class Finding:
    """What was found in a data set, told once for all entries that it concerns."""

    severity: Severity
    thing: str
    """What has it: "object", "image", "category", ...; empty for the file itself."""
    kind: str
    message: str
    """Of an error, what is wrong with the first entry. Else what follows the number of things, such as
    "whose mask covers no pixel", or all there is to say of the file."""
    remedy: str = ""
    ids: list[Any] = field(default_factory=list)

    def line(self) -> str:
        """What was found, how often, the first three that have it, and what to do."""
        remedy = f"; {self.remedy}" if self.remedy else ""
        if not self.thing:
            return self.message + remedy
        if self.severity == "error":
            others = _some(self.ids[1:])
            count = f", {len(self.ids)} in all" if len(self.ids) > 4 else ""
            same = f" (the same: {others}){count}" if others else ""
            return f"{self.thing} {self.ids[0]}: {self.message}{same}{remedy}"
        count = count_of(len(self.ids), self.thing)
        if self.severity == "left out":
            count = ("skipped " if self.thing == "box" else "left out ") + count
        ids = _some(self.ids)
        if self.thing in ("object", "box"):
            ids = f"annotation{'s' if len(self.ids) > 1 else ''} {ids}"
        return f"{count} {self.message} ({ids}){remedy}"


class Problems:
    """What was found in a data set. Findings of one kind become one, with the ids of all."""

    def __init__(self, most_kinds: int = 5) -> None:
        self.most_kinds = most_kinds
        self.found: dict[tuple[str, str, str], Finding] = {}

    def add(self, thing: str, identifier: Any, fault: str, kind: str | None = None, remedy: str = "") -> None:
        """Note that `thing`, such as "image", has a fault. Faults that differ in digits alone, or that
        are given the same kind, are of one kind."""
        if kind is None:
            kind = "".join("#" if letter.isdigit() else letter for letter in fault)
        self.say("error", thing, fault, remedy, [identifier], kind)

    def say(
        self,
        severity: Severity,
        thing: str,
        message: str,
        remedy: str = "",
        ids: Iterable[Any] = (),
        kind: str | None = None,
    ) -> None:
        """Add to the finding of this kind, which by default is the message."""
        kind = message if kind is None else kind
        place = (severity, thing, kind)
        if place not in self.found:
            self.found[place] = Finding(severity, thing, kind, message, remedy)
        self.found[place].ids.extend(ids)

    @property
    def has_errors(self) -> bool:
        return any(finding.severity == "error" for finding in self.found.values())

    def told(self) -> list[Finding]:
        """All that is no error, what was left out first."""
        return [
            finding
            for severity in ("left out", "note")
            for finding in self.found.values()
            if finding.severity == severity
        ]

    def check(self, file: Path) -> None:
        """Raise UserError if there are errors."""
        errors = [finding for finding in self.found.values() if finding.severity == "error"]
        if not errors:
            return
        shown = errors[: self.most_kinds]
        rest = len(errors) - len(shown)
        tail = f"; and {rest} other kinds of mistakes" if rest > 0 else ""
        if any(not finding.remedy for finding in shown):
            tail += "; correct or remove what is named"
        raise UserError(f"{file}: {'; '.join(finding.line() for finding in shown)}{tail}")


def count_of(number: int, one: str, many: str | None = None) -> str:
    """ "1 image", "2 images"."""
    return f"{number} {one if number == 1 else many or PLURALS.get(one, one + 's')}"


def _some(ids: Sequence[Any]) -> str:
    return ", ".join(str(i) for i in ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
