"""What is known of the images and objects of a data set, and the mistakes found in them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

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
    objects: list[ObjectRecord]
    annotations: Path
    """The file that lists this image, for messages."""
    reading: Reading = AS_IT_IS


class ImageProposals(NamedTuple):
    """Of one image, by falling score."""

    boxes: NDArray[np.float32]  # (n, 4) xyxy in pixels of the original image
    scores: NDArray[np.float32]  # (n,) objectness


class Problems:
    """Mistakes of one kind are told once, with the ids of the others."""

    def __init__(self, most_kinds: int = 5) -> None:
        self.most_kinds = most_kinds
        self.found: dict[tuple[str, str], tuple[str, list[Any]]] = {}

    def add(self, thing: str, identifier: Any, fault: str, kind: str | None = None) -> None:
        """Note that `thing`, such as "image", has a fault. Faults that differ in digits alone, or that
        are given the same kind, are of one kind."""
        if kind is None:
            kind = "".join("#" if letter.isdigit() else letter for letter in fault)
        self.found.setdefault((thing, kind), (fault, []))[1].append(identifier)

    def check(self, file: Path) -> None:
        """Raise UserError if there are any."""
        if not self.found:
            return
        parts = []
        for (thing, _), (fault, ids) in self.found.items():
            others = ", ".join(str(i) for i in ids[1:4]) + (
                f" and {len(ids) - 4} more" if len(ids) > 4 else ""
            )
            parts.append(f"{thing} {ids[0]}: {fault}" + (f" (the same: {others})" if others else ""))
        rest = len(parts) - self.most_kinds
        tail = f"; and {rest} other kinds of mistakes" if rest > 0 else ""
        raise UserError(
            f"{file}: {'; '.join(parts[: self.most_kinds])}{tail}; correct or remove what is named"
        )
