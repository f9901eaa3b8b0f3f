"""All that a model sees in an image, kept so that a threshold can move without another run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask

from fastmrcnn.data.headers import read_header
from fastmrcnn.data.images import ImageError, read_noted
from fastmrcnn.detection.detector import Detector
from fastmrcnn.detection.objects import Objects, coco_results
from fastmrcnn.errors import UserError


@dataclass(frozen=True)
class Found:
    """What is in one image. Objects are numbered from 1 by falling score, and keep their numbers."""

    name: str  # of the file, without its folder
    pixels: NDArray[np.uint8]  # (h, w, 3)
    objects: Objects  # all n that the model gives; masks as probabilities, on the host
    entries: list[dict[str, Any]]  # COCO's, of each object
    areas: NDArray[np.int64]  # (n,) in pixels: of the masks, or of the boxes if there are none
    notes: list[str]  # what there is to say of the file

    @property
    def has_masks(self) -> bool:
        return self.objects.probabilities is not None

    def chosen(self, score: float, classes: Collection[int] | None = None) -> NDArray[np.int64]:
        """Places of the objects with this score or more; None: of all classes."""
        assert self.objects.scores is not None, "what was found has them"
        keep = self.objects.scores >= score
        if classes is not None:
            keep &= np.isin(self.objects.classes, list(classes))
        return np.flatnonzero(keep)


def look(detector: Detector, path: Path, name: str) -> Found:
    """Run the model once, at its lowest score.

    Args:
        path: the image file; name: what to call it.
    Raises:
        UserError: it cannot be read. The line does not tell the path, which is a temporary one.
    """
    reading = detector.reading
    try:
        header = read_header(path, reading.max_pixels)
    except ImageError as fault:
        why = {
            "missing": "is not there any more; choose it again",
            "unreadable": f"is not an image that can be read here{fault}; try PNG, JPEG or TIFF",
            "large": f"has more than {reading.max_pixels:,} pixels; cut it into tiles",
        }
        raise UserError(f"{name} {why.get(fault.kind, f'cannot be read ({fault}); save it anew')}") from None
    try:
        pixels, note = read_noted(path, reading)
    except UserError as error:
        raise UserError(f"{name}: {str(error).removeprefix(f'{path}: ')}") from None
    notes = [] if note is None else [f"Its {note.text}."]
    if header.pages:
        notes.append("It has several pages, of which the first is taken.")
    objects = detector.detect(pixels, 0.0)
    card = detector.card
    threshold, offset = card.config.model.mask_head.threshold, card.config.data.keypoint_offset
    results = coco_results([objects], [1], card.category_ids, threshold, offset)
    names = [card.class_names[label] for label in objects.classes.tolist()]
    entries = [
        {**entry, "category_name": category, "file_name": name}
        for entry, category in zip(results, names, strict=True)
    ]
    if objects.probabilities is not None:
        objects = replace(objects, probabilities=objects.probabilities.cpu())
        rles = [entry["segmentation"] for entry in entries]
        areas = np.array([int(coco_mask.area(rle)) for rle in rles], np.int64)
    else:
        sides = objects.boxes[:, 2:] - objects.boxes[:, :2]
        areas = np.rint(sides[:, 0].astype(np.float64) * sides[:, 1]).astype(np.int64)
    return Found(name, pixels, objects, entries, areas, notes)


def subset(objects: Objects, places: NDArray[np.int64]) -> Objects:
    """The objects at these places."""
    arrays = {key: value for key, value in vars(objects).items() if key not in ("height", "width")}
    cut: dict[str, Any] = {
        key: value[torch.from_numpy(places)] if isinstance(value, torch.Tensor) else value[places]
        for key, value in arrays.items()
        if value is not None
    }
    return replace(objects, **cut)
